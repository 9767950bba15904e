"""Images in chats, asked by OpenAI's own client. The echo engine says an image's bytes as if they were text."""

from __future__ import annotations

import asyncio
import base64
import io

import openai
import pytest

WORDS = b"four five six"


def client(server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def url(data: bytes = WORDS, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image(data: bytes = WORDS, **more) -> dict:
    return {"type": "image_url", "image_url": {"url": url(data), **more}}


def text(said: str) -> dict:
    return {"type": "text", "text": said}


def user(*parts: dict) -> list[dict]:
    return [{"role": "user", "content": [*parts]}]


async def test_openai_client_sends_images_whole_and_streamed_to_both_doors(serve):
    async with serve("echo:a") as server:
        ask = client(server).chat.completions.create
        messages = user(text("one two three"), image(detail="auto"), text("seven"))
        whole = await ask(model="echo:a", messages=messages)
        assert whole.choices[0].message.content == "one two three four five six seven"
        assert whole.usage.prompt_tokens == 7
        stream = await ask(model="echo:a", messages=messages, stream=True, stream_options={"include_usage": True})
        events = [event async for event in stream]
        assert (
            "".join(e.choices[0].delta.content or "" for e in events if e.choices) == whole.choices[0].message.content
        )
        assert events[-1].usage.prompt_tokens == 7

        parts = [{"type": "input_text", "text": "one"}, {"type": "input_image", "image_url": url(), "detail": "auto"}]
        asked = [{"role": "user", "content": parts}]
        response = await client(server).responses.create(model="echo:a", input=asked, store=False)
        assert response.output_text == "one four five six"


async def test_texts_in_parts_stay_one_text_where_there_is_no_image(serve):
    async with serve("echo:a") as server:
        answer = await client(server).chat.completions.create(model="echo:a", messages=user(text("one"), text("two")))
    assert answer.choices[0].message.content == "one\ntwo"


def at(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


AT = "messages[0].content[0]"


@pytest.mark.parametrize(
    ("messages", "param", "code"),
    [
        (user(at("https://example.org/a.png")), f"{AT}.image_url.url", "invalid_image_url"),
        (user(at("http://169.254.169.254/")), f"{AT}.image_url.url", "invalid_image_url"),
        (user(at("file:///etc/passwd")), f"{AT}.image_url.url", "invalid_image_url"),
        (user(at("/etc/passwd")), f"{AT}.image_url.url", "invalid_image_url"),
        (user(at(url(kind="text/html"))), f"{AT}.image_url.url", "invalid_image_url"),
        (user(at("data:image/png,raw")), f"{AT}.image_url.url", "invalid_image_url"),
        (user(at(url()[:-1])), f"{AT}.image_url.url", "invalid_image"),
        (user(at(url() + "é")), f"{AT}.image_url.url", "invalid_image"),
        (user(at(url() + "\n")), f"{AT}.image_url.url", "invalid_image"),
        (user(image(detail="high")), f"{AT}.image_url.detail", "unsupported_value"),
        (user(image(path="/etc/passwd")), f"{AT}.image_url.path", "unsupported_parameter"),
        (user({"type": "image_url"}), f"{AT}.image_url", "missing_parameter"),
        (user({"type": "image_url", "image_url": url()}), f"{AT}.image_url", "invalid_value"),
        (user({"type": "image", "image": url()}), f"{AT}.type", "unsupported_value"),
        ([{"role": "system", "content": [image()]}], f"{AT}.image_url.url", "unsupported_value"),
    ],
)  # fmt: skip
async def test_a_wrong_image_is_400_and_names_its_field(serve, messages, param, code):
    async with serve("echo:a") as server:
        status, body = await server.post("/v1/chat/completions", {"model": "echo:a", "messages": messages})
    assert status == 400, body
    assert (body["error"]["param"], body["error"]["code"]) == (param, code), body


async def test_an_address_is_refused_with_what_to_send_instead(serve):
    async with serve("echo:a") as server:
        part = at("https://example.org/a.png")
        with pytest.raises(openai.BadRequestError, match="must be a `data:` URL, as `data:image/png;base64"):
            await client(server).chat.completions.create(model="echo:a", messages=user(part))


async def test_tokens_of_images_are_not_told_by_tokenize(serve):
    async with serve("echo:a") as server:
        status, body = await server.post("/tokenize", {"model": "echo:a", "messages": user(image())})
    assert (status, body["error"]["param"]) == (400, f"{AT}.image_url.url")


async def test_the_same_text_with_another_image_is_not_answered_from_the_cache(serve):
    async with serve("echo:a", toml='[middleware]\norder = ["cache"]') as server:

        async def ask(data: bytes) -> tuple[str, str]:
            body = {"model": "echo:a", "temperature": 0, "messages": user(text("see"), image(data))}
            async with server.session.post(server.url + "/v1/chat/completions", json=body) as response:
                answer = await response.json()
                return response.headers["x-cache"], answer["choices"][0]["message"]["content"]

        assert await ask(b"red") == ("miss", "see red")
        assert await ask(b"blue") == ("miss", "see blue")
        assert await ask(b"red") == ("hit", "see red")


async def test_a_large_image_does_not_use_the_tokens_of_a_key_up(serve):
    toml = '[middleware]\norder = ["rate_limit"]\n[middleware.rate_limit]\ntokens_per_minute = 3000'
    async with serve("echo:a", toml=toml) as server:
        answer = await client(server).chat.completions.create(
            model="echo:a", messages=user(image(b"x" * 2**20)), max_tokens=5
        )
    assert answer.usage.prompt_tokens == 1


async def test_images_are_not_in_the_log(serve, capsys):
    async with serve("echo:a") as server:
        await client(server).chat.completions.create(model="echo:a", messages=user(text("hm"), image(b"my-secret")))
        broken = at(url(b"my-secret") + "!")
        with pytest.raises(openai.BadRequestError) as caught:
            await client(server).chat.completions.create(model="echo:a", messages=user(broken))
    logged = "".join(capsys.readouterr()) + str(caught.value)
    assert "/v1/chat/completions" in logged
    assert "my-secret" not in logged
    assert url(b"my-secret").partition(",")[2] not in logged


async def test_a_model_of_texts_takes_no_images_and_says_so_by_its_name(serve, tmp_path):
    pytest.importorskip("torch")
    from tests.engines import tiny

    folder = str(tiny.save(tmp_path / "llama", tiny.ARCHITECTURES["llama"]()))
    async with serve(folder, toml='[engine]\norder = ["transformers"]') as server:
        _, models = await server.get("/v1/models")
        name = models["data"][0]["id"]
        with pytest.raises(openai.BadRequestError, match=f"`{name}` takes no images") as caught:
            await client(server).chat.completions.create(model=name, messages=user(text("hm"), image()))
        assert caught.value.param == "messages[0].content[1].image_url.url"
        asked = [{"role": "user", "content": [{"type": "input_image", "image_url": url()}]}]
        with pytest.raises(openai.BadRequestError, match=f"`{name}` takes no images") as caught:
            await client(server).responses.create(model=name, input=asked, store=False)
        assert caught.value.param == "input[0].content[0].image_url"


@pytest.fixture
def looker(tmp_path) -> str:
    for package in ("torch", "transformers", "PIL"):
        pytest.importorskip(package)
    from tests.engines.looking import tiny_vision

    return str(tiny_vision(tmp_path / "looker"))


def generated(folder: str, data: bytes, said: str, tokens: int) -> tuple[str, int]:
    """What transformers' own `generate` says of an image, and how many tokens the prompt has."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    content = [{"type": "image", "image": Image.open(io.BytesIO(data))}, text(said)]
    made = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    out = model.generate(**made, max_new_tokens=tokens, do_sample=False)
    prompt = made["input_ids"].shape[1]
    return processor.decode(out[0, prompt:], skip_special_tokens=True), prompt


async def test_a_real_model_looks_refuses_and_stops_when_its_caller_leaves(serve, looker):
    from tests.engines.looking import picture

    async with serve(looker, toml='[engine]\norder = ["openvino", "transformers", "vision"]') as server:
        _, models = await server.get("/v1/models")
        (model,) = models["data"]
        assert model["tasks"] == ["generate", "image-text-to-text"]
        name, ask = model["id"], client(server).chat.completions.create
        messages = user(image(picture()), text("what is it?"))
        whole = await ask(model=name, messages=messages, temperature=0, max_tokens=16)
        wanted, prompt = generated(looker, picture(), "what is it?", 16)
        assert (whole.choices[0].message.content, whole.usage.prompt_tokens) == (wanted, prompt)
        stream = await ask(model=name, messages=messages, temperature=0, max_tokens=16, stream=True)
        assert "".join([e.choices[0].delta.content or "" async for e in stream if e.choices]) == wanted
        stopped = await ask(model=name, messages=messages, temperature=0, max_tokens=16, stop=[wanted[3:5]])
        assert stopped.choices[0].message.content == wanted[: wanted.index(wanted[3:5])]
        assert (await ask(model=name, messages=[{"role": "user", "content": "hm"}], max_tokens=2)).usage.total_tokens
        parts = [{"type": "input_image", "image_url": url(picture())}, {"type": "input_text", "text": "what is it?"}]
        response = await client(server).responses.create(
            model=name, input=[{"role": "user", "content": parts}], temperature=0, max_output_tokens=16, store=False
        )
        assert response.output_text == wanted

        with pytest.raises(openai.BadRequestError) as caught:
            await ask(model=name, messages=user(text("hm"), image(b"no image")))
        assert (caught.value.param, caught.value.code) == ("messages[0].content[1].image_url.url", "invalid_image")

        stream = await ask(model=name, messages=messages, max_tokens=400, stream=True, extra_body={"ignore_eos": True})
        async for _ in stream:
            break
        await stream.close()
        (host,) = (r.host for m in server.runtime.pool.models() for r in m.replicas)
        async with asyncio.timeout(30):
            while host.outstanding:
                await asyncio.sleep(0.01)
        assert (await ask(model=name, messages=messages, temperature=0, max_tokens=16)).choices == whole.choices
