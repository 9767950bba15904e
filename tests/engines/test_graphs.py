"""Models that come as graphs: text from OpenVINO's own format by paged attention; vectors and scores also from ONNX."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hfms_cli import Conversation, Draft, HfmsError, LoadFailed, LoadRequest
from hfms_cli.models.inspect import inspect
from hfms_engines.embeddings import Embeddings, EmbeddingsOptions
from hfms_engines.generation import GenerationEngine
from hfms_engines.openvino import OpenVinoEngine, OpenVinoOptions

pytest.importorskip("sentence_transformers")
# Before torch and openvino, whose environment they set.
pytest.importorskip("hfms_engines.torch_runner", exc_type=ImportError)
pytest.importorskip("hfms_engines.openvino_export", exc_type=ImportError)

import msgspec
import openvino as ov

from hfms_engines import openvino_export, openvino_ir, torch_runner
from tests.engines import peft_adapters, test_openvino, tiny
from tests.engines.driving import CPU, ask, call, drain, prompts
from tests.engines.graphs import decoder_ir, encoder_ir, encoder_onnx
from tests.engines.sentences import (
    TEXTS,
    dense,
    embed,
    normalize,
    pooling,
    sentence_model,
    theirs,
    tiny_bert,
    tiny_cross_encoder,
)
from tests.engines.sentences import drain as drain_scores
from tests.engines.test_openvino import expected, scheduler, submit

GRAPHS = {"openvino": encoder_ir, "onnx": encoder_onnx}
WORDS = [text for text in TEXTS if text]


def request(folder: Path, **more) -> LoadRequest:
    return replace(LoadRequest(folder=folder, card=inspect(folder), device=CPU, dtype="float32"), **more)


def noted(folder: Path, out: Path) -> Path:
    """What the process notes on a model, noted in this one."""
    out.mkdir()
    openvino_ir.make(openvino_export.Job(str(folder), inspect(folder), CPU, "none"), out)
    return out


@pytest.fixture(scope="module")
def decoder(llama, tmp_path_factory) -> Path:
    return decoder_ir(llama, tmp_path_factory.mktemp("graph") / "llama")


@pytest.fixture
def engine(tmp_path) -> OpenVinoEngine:
    return OpenVinoEngine(OpenVinoOptions(cache_dir=str(tmp_path / "cache"), kv_cache_bytes=2**22))


# --- text ---


@pytest.mark.parametrize("name", ["llama", "cohere", "gpt_neox", "phi3"])
def test_tokens_of_an_openvino_model_equal_those_of_generate_alone_and_in_a_batch(name, tmp_path, made):
    source = tiny.save(tmp_path / "source", tiny.ARCHITECTURES[name]())
    reference = torch_runner.load(test_openvino.request(source), cache_bytes=2**26).model
    some = prompts(3, 11, 45, 70)
    wanted = [expected(reference, p, 20 + i) for i, p in enumerate(some)]
    graph = decoder_ir(source, tmp_path / "graph")
    model = scheduler(noted(graph, tmp_path / "notes"), graph=graph / openvino_export.MODEL)
    submit(model, "alone", some[2], max_tokens=22)
    drain(model)
    for i, prompt in enumerate(some):
        submit(model, f"mixed {i}", prompt, max_tokens=20 + i)
        model.step()
    drain(model)
    assert made["alone", 0] == wanted[2]
    assert [made[f"mixed {i}", 0] for i in range(len(some))] == wanted


def test_an_openvino_model_is_served_with_its_template_and_its_notes_are_kept(decoder, engine, llama):
    asked = request(decoder)
    assert engine.supports(asked.card, CPU) is None
    model = engine.load(asked)
    assert (model.info.context_length, model.info.chat, model.info.quantize) == (512, True, "none")
    told = ask(model, Conversation(messages=[{"role": "user", "content": "The quick"}]), max_tokens=6)
    assert told.ended == {"a": None}
    assert told.tokens("a") == 6
    (notes,) = (Path(engine.options.cache_dir) / "openvino").iterdir()
    assert not list(notes.glob("*.bin"))  # the weights are not there a second time
    before = notes.stat().st_mtime_ns
    engine.load(asked)
    assert notes.stat().st_mtime_ns == before
    assert list(engine.leftovers()) == []


def test_adapters_change_an_openvino_model_as_they_change_the_model_it_was_made_of(llama, decoder, tmp_path, made):
    folder = peft_adapters.save(tmp_path / "adapter", llama)
    [prompt] = prompts(12)
    from hfms_engines import openvino_runner
    from hfms_engines.paged import PagedScheduler

    notes = noted(decoder, tmp_path / "notes")
    runner = openvino_runner.load(
        notes,
        dtype="float32",
        cache_bytes=2**22,
        share=True,
        max_loras=1,
        max_lora_rank=8,
        graph=decoder / openvino_export.MODEL,
    )
    info = scheduler(notes, graph=decoder / openvino_export.MODEL).info
    model = PagedScheduler(runner, info, prefill_tokens=24, stall_seconds=60)
    model.add_adapter(peft_adapters.read(folder, "x"))
    for name in ("", "x"):
        asked = call(f"by {name}", prompt, ignore_eos=True, max_tokens=12)
        model.submit(msgspec.structs.replace(asked, adapter=name))
    drain(model)
    assert made["by x", 0] == expected(peft_adapters.merged(llama, folder), prompt, 12) != made["by ", 0]


def test_an_openvino_model_that_is_to_be_quantised_is_refused_and_the_operators_usual_bits_are_not_asked_of_it(
    decoder, engine
):
    with pytest.raises(LoadFailed, match="keeps the bits"):
        engine.load(request(decoder, quantize="int8"))
    usual = OpenVinoEngine(replace(engine.options, quantize="int8"))
    assert usual.load(request(decoder)).info.quantize == "none"


def test_an_openvino_model_whose_window_gets_lost_is_refused(tmp_path):
    # The test's own mask is none that OpenVINO's transformation knows, unlike optimum's.
    source = tiny.save(tmp_path / "source", tiny.ARCHITECTURES["mistral-sliding"]())
    with pytest.raises(LoadFailed, match="look back at some tokens only"):
        noted(decoder_ir(source, tmp_path / "graph"), tmp_path / "notes")


def test_an_openvino_model_that_says_something_else_with_paged_attention_is_refused(tmp_path):
    # Its biases by distance are in a mask that OpenVINO's transformation drops.
    source = tiny.save(tmp_path / "source", tiny.ARCHITECTURES["falcon-alibi"]())
    with pytest.raises(LoadFailed, match="with paged attention its logits differ by"):
        noted(decoder_ir(source, tmp_path / "graph"), tmp_path / "notes")


def test_an_openvino_model_may_guess_for_another_as_a_draft(llama, decoder, engine):
    plain = ask(engine.load(request(llama)), [5, 6, 7, 8], max_tokens=8, ignore_eos=True).text("a")
    model = engine.load(request(llama, draft=Draft(decoder, inspect(decoder))))
    assert ask(model, [5, 6, 7, 8], max_tokens=8, ignore_eos=True).text("a") == plain


def test_an_openvino_model_without_states_is_refused_with_how_to_export_it(llama, tmp_path):
    folder = encoder_ir(tiny_bert(tmp_path / "bert"), tmp_path / "graph")
    shutil.copy(llama / "config.json", folder)
    with pytest.raises(LoadFailed, match="--task text-generation-with-past"):
        noted(folder, tmp_path / "notes")


def test_an_openvino_model_with_a_tokenizer_in_openvinos_format_alone_is_refused_by_name(decoder, tmp_path):
    folder = Path(shutil.copytree(decoder, tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(LoadFailed, match=r"no tokenizer\.json"):
        noted(folder, tmp_path / "notes")


def test_text_from_onnx_is_refused_by_every_engine_with_what_it_reads(decoder, tmp_path):
    for path in decoder.glob("openvino_model.*"):
        shutil.copy(path, tmp_path)
    shutil.copy(decoder / "config.json", tmp_path)
    (tmp_path / "openvino_model.xml").rename(tmp_path / "model.onnx")
    card = inspect(tmp_path)
    assert (card.format, card.tasks) == ("onnx", ("generate",))
    for engine in (OpenVinoEngine(), GenerationEngine()):
        assert "its weights are onnx, and this engine reads safetensors" in engine.supports(card, CPU)


# --- vectors and scores ---


@pytest.mark.parametrize("format", GRAPHS)
def test_vectors_of_a_graph_are_those_of_sentence_transformers(format, tmp_path):
    plain = tiny_bert(tmp_path / "plain")
    source = sentence_model(tmp_path / "source", plain, pooling("cls", "mean"), dense(12, width=64), normalize())
    folder = tmp_path / "graph"
    GRAPHS[format](source, folder, within=format)
    for name in ("modules.json", "1_Pooling", "2_Dense"):  # of which one has weights of its own, as safetensors
        (shutil.copytree if (source / name).is_dir() else shutil.copy)(
            source / name, folder / name, **({"dirs_exist_ok": True} if (source / name).is_dir() else {})
        )
    assert inspect(folder).format == format
    model = Embeddings(EmbeddingsOptions()).load(request(folder, dtype="auto"))
    assert (model.info.dtype, model.info.dimensions, model.info.context_length) == ("float32", 12, 64)
    assert np.abs(embed(model, WORDS) - theirs(source, WORDS)).max() < 1e-5


@pytest.mark.real_model
def test_minilm_as_onnx_says_what_sentence_transformers_says(minilm, tmp_path):
    model = Embeddings().load(request(encoder_onnx(minilm, tmp_path / "graph"), dtype="auto"))
    ours, wanted = embed(model, WORDS), theirs(minilm, WORDS)
    assert 1 - (ours * wanted).sum(1).min() < 1e-5
    assert (model.info.dimensions, model.info.context_length) == (384, 256)


@pytest.mark.parametrize("format", GRAPHS)
def test_scores_of_a_graph_are_those_of_the_model_that_it_was_made_of(format, tmp_path):
    from hfms_cli import Call, Pair

    source = tiny_cross_encoder(tmp_path / "source")
    folder = GRAPHS[format](source, tmp_path / "graph")
    pairs = [Pair("the cat", word) for word in WORDS]
    said = []
    for engine, where in ((Embeddings(), folder), (Embeddings(EmbeddingsOptions(runner="torch")), source)):
        model = engine.load(request(where))
        model.submit(Call(id="a", model="m", task="score", inputs=pairs))
        *chunks, end = drain_scores(model)["a"]
        assert end is None
        said.append([chunk.score for chunk in sorted(chunks, key=lambda c: c.index)])
    assert said[0] == pytest.approx(said[1], abs=1e-5)


def test_a_graph_that_asks_for_what_is_not_known_is_refused_by_its_name(tmp_path):
    folder = encoder_ir(tiny_bert(tmp_path / "plain"), tmp_path / "graph")
    model = ov.Core().read_model(folder / "openvino_model.xml")
    model.inputs[2].set_names({"pixel_values"})
    ov.save_model(model, tmp_path / "other.xml", compress_to_fp16=False)
    for suffix in (".xml", ".bin"):
        shutil.move((tmp_path / "other").with_suffix(suffix), (folder / "openvino_model").with_suffix(suffix))
    with pytest.raises(LoadFailed, match="asks for pixel_values"):
        Embeddings().load(request(folder))


@pytest.mark.parametrize(
    ("format", "name"), [("openvino", "openvino_model.xml"), ("onnx", "onnx/model.onnx"), ("onnx", "model.onnx")]
)
def test_a_torn_graph_is_refused_in_words(format, name, tmp_path):
    folder = GRAPHS[format](tiny_bert(tmp_path / "plain"), tmp_path / "graph", within=name.rpartition("/")[0])
    (folder / name).write_bytes((folder / name).read_bytes()[:20_000])
    with pytest.raises(HfmsError, match=r"cannot read this|Fetch the model again"):
        Embeddings().load(request(folder))


@pytest.mark.parametrize("location", ["../outside.bin", "/outside.bin", "link.bin"])
def test_weights_that_an_onnx_model_names_outside_of_its_folder_are_not_read(location, tmp_path):
    onnx = pytest.importorskip("onnx")
    folder = encoder_onnx(tiny_bert(tmp_path / "plain"), tmp_path / "graph")
    graph = folder / "onnx/model.onnx"
    model = onnx.load(graph)
    tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    outside = tmp_path / "outside.bin"
    outside.write_bytes(tensor.raw_data)
    shutil.copy(outside, folder / "outside.bin")
    (graph.parent / "link.bin").symlink_to(outside)
    named = str(outside) if location.startswith("/") else location
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=named)
    graph.write_bytes(model.SerializeToString())
    with pytest.raises(LoadFailed, match="cannot read this onnx model"):
        Embeddings().load(request(folder))


def test_torch_is_not_asked_to_run_a_graph(tmp_path):
    card = inspect(encoder_onnx(tiny_bert(tmp_path / "plain"), tmp_path / "graph"))
    assert "neither OpenVINO's format nor ONNX" in Embeddings(EmbeddingsOptions(runner="torch")).supports(card, CPU)
    without = Embeddings(find=lambda name: None if name == "openvino" else True)
    assert without.supports(card, CPU) == "openvino not installed: pip install 'hfms[openvino]'"
    with pytest.raises(LoadFailed, match="keeps the bits"):
        Embeddings().load(request(tmp_path / "graph", quantize="int8"))


def test_what_a_graph_says_of_its_weights_is_read_without_openvino(decoder, tmp_path):
    card = inspect(decoder)
    (weights,) = decoder.glob("*.bin")
    assert (card.format, card.dtype, card.context_length) == ("openvino", "float32", 512)
    assert card.weights_bytes == weights.stat().st_size
    assert 4 * card.parameters == pytest.approx(card.weights_bytes, rel=0.01)
    torn = Path(shutil.copytree(decoder, tmp_path / "torn"))
    with (torn / weights.name).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(LoadFailed, match="has 1,000 bytes of"):
        inspect(torn)


def test_a_config_decides_what_a_graph_is_for(decoder, tmp_path):
    folder = Path(shutil.copytree(decoder, tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    assert inspect(folder).tasks == ()
