"""The speech engine: as transformers' own `generate`, and calm about files of any kind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hfms_cli import BadRequest, Call, LoadRequest, Sampling, Speech
from hfms_cli.models.inspect import inspect
from hfms_engines.speech import SpeechEngine, SpeechOptions
from hfms_engines.turns import Turns
from tests.engines.driving import CPU, Answers, drain

for package in ("torch", "transformers", "soundfile", "soxr"):
    pytest.importorskip(package)

from tests.engines.speeches import noise, recording, tiny_whisper  # noqa: E402 - after the packages that it needs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def model(folder):
    engine = SpeechEngine(SpeechOptions(max_seconds=120.0))
    card = inspect(folder)
    assert card.tasks == ("transcribe",)
    assert engine.supports(card, CPU) is None
    return engine.load(LoadRequest(folder=folder, card=card, device=CPU))


def call(id: str, data: bytes, **speech) -> Call:
    sampling = Sampling(temperature=0.0)
    return Call(id=id, model="m", task="transcribe", inputs=[Speech(data=data, **speech)], sampling=sampling)


def segments(answers: Answers, id: str) -> list[tuple[float, float, str]]:
    return [(c.segment.start, c.segment.end, c.segment.text) for c in answers.chunks[id] if c.segment]


@pytest.fixture(scope="module")
def theirs(folder):
    """What transformers' own `generate` makes of a sound: start, end and tokens of each segment."""
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    model = WhisperForConditionalGeneration.from_pretrained(folder)
    processor = WhisperProcessor.from_pretrained(folder)

    def heard(sound, task="transcribe", **how) -> list[tuple[float, float, list[int]]]:
        long = {"truncation": False, "padding": "longest"} if len(sound) > 30 * 16_000 else {}
        made = processor(sound, sampling_rate=16_000, return_tensors="pt", return_attention_mask=True, **long)
        found = model.generate(**made, return_timestamps=True, return_segments=True, task=task, **how)
        return [(float(s["start"]), float(s["end"]), s["tokens"].tolist()) for s in found["segments"][0]]

    return heard


def same(answers: Answers, id: str, wanted: list[tuple[float, float, list[int]]]) -> bool:
    told = [c.segment for c in answers.chunks[id] if c.segment]
    times = [t for s in told for t in (s.start, s.end)]
    assert times == pytest.approx([t for s in wanted for t in s[:2]], abs=1e-3)
    return bool(told) and [s.tokens for s in told] == [tokens for *_, tokens in wanted]


@pytest.mark.parametrize("seconds", [0.5, 3, 30, 75])
def test_what_is_heard_is_what_transformers_generate_hears(model, theirs, seconds):
    model.submit(call("a", recording(seconds)))
    answers = drain(model)
    assert answers.ended == {"a": None}
    assert same(answers, "a", theirs(noise(seconds)))
    assert answers.prompt_tokens("a") == [round(50 * seconds)]


def test_language_and_translation_are_those_that_were_asked_for(model, theirs):
    model.submit(call("german", recording(3), language="German"))
    model.submit(call("english", recording(3), language="fr", translate=True))
    answers = drain(model)
    for id, language, task in (("german", "de", "transcribe"), ("english", "fr", "translate")):
        assert same(answers, id, theirs(noise(3), language=language, task=task))
    assert answers.chunks["german"][0].recording.language == "german"


def test_calls_take_turns_and_hear_what_they_hear_alone(model):
    lengths = {"long": 45, "short": 1, "other": 4}
    alone = {}
    for id, seconds in lengths.items():
        model.submit(call(id, recording(seconds, seed=seconds)))
        alone[id] = segments(drain(model), id)
    for id, seconds in lengths.items():
        model.submit(call(id, recording(seconds, seed=seconds)))
    answers = Answers()
    while not answers.ended:
        answers.take(model.step())
    assert all(answers.chunks[id] for id in lengths), "each has begun before one has ended"
    drain(model, answers)
    assert {id: segments(answers, id) for id in lengths} == alone


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3"])
def test_every_format_is_decoded_mixed_and_resampled(format):
    import numpy

    from hfms_engines import sound

    data = recording(2, rate=44_100, format=format, channels=2)
    heard = numpy.concatenate(list(sound.decoded(data, rate=16_000, longest=10)))
    wanted = noise(2)
    assert abs(len(heard) - len(wanted)) < 0.1 * 16_000
    # Of the tone, whatever the noise and the codec's delay have done.
    strength = [numpy.abs(numpy.fft.rfft(s, 32_768))[600:1100].mean() for s in (heard, wanted)]
    assert strength[0] == pytest.approx(strength[1], rel=0.2)


HOSTILE = {
    "no sound": b"GIF89a not a recording",
    "random": os.urandom(4096),
    "a header alone": recording(1)[:44],
    "flac that is cut": recording(5, format="FLAC")[:2000],
    "no samples": recording(0),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_file_that_is_no_recording_is_refused_by_name(model, data):
    model.submit(call("a", data))
    answers = drain(model)
    error = answers.ended["a"]
    assert isinstance(error, BadRequest)
    assert (error.param, error.code) == ("file", "invalid_audio")


def test_a_small_file_with_hours_of_silence_is_refused_while_it_is_decoded(model):
    import io

    import numpy
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, numpy.zeros(16_000 * 3600, "int16"), 16_000, format="FLAC")
    assert len(file.getvalue()) < 2**20
    model.submit(call("a", file.getvalue()))
    error = drain(model).ended["a"]
    assert isinstance(error, BadRequest)
    assert (error.param, error.code) == ("file", "audio_too_long")


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"language": "klingon"}, "language"),
        ({"prompt": "word " * 100}, "prompt"),
        ({"prompt": "a <|startoftranscript|> b"}, "prompt"),
    ],
)
def test_what_no_sound_could_make_right_is_refused_at_once(model, asked, param):
    with pytest.raises(BadRequest) as caught:
        model.submit(call("a", recording(1), **asked))
    assert caught.value.param == param
    assert not model.busy()


def test_a_prompt_changes_what_is_heard(model):
    model.submit(call("a", recording(3)))
    model.submit(call("b", recording(3), prompt="zzz"))
    answers = drain(model)
    assert answers.ended == {"a": None, "b": None}
    assert segments(answers, "a") != segments(answers, "b")


def test_a_cancelled_call_ends_at_its_next_token(model):
    model.submit(call("a", recording(60)))
    answers = Answers()
    while not answers.chunks["a"]:
        answers.take(model.step())
    model.cancel("a")
    assert not model.busy()
    model.submit(call("b", recording(1)))
    assert drain(model).ended == {"b": None}


def test_details_tell_how_likely_nobody_speaks(model):
    model.submit(call("a", recording(3), details=True))
    told = [c.segment for c in drain(model).chunks["a"] if c.segment]
    assert all(0 < s.no_speech_prob < 1 and s.avg_logprob < 0 and s.compression_ratio > 0 for s in told)


def test_without_its_packages_the_engine_says_which(folder):
    engine = SpeechEngine(find=lambda name: None if name == "soundfile" else True)
    assert engine.supports(inspect(folder), CPU) == "soundfile not installed; run: pip install 'hfms[audio]'"


def test_work_in_turns_ends_where_it_is_dropped_and_raises_where_it_fails():
    done: list[int] = []

    def work(pause) -> None:
        for i in range(3):
            done.append(i)
            pause()

    turns = Turns(work)
    assert (turns.go_on(), turns.go_on()) == (False, False)
    turns.drop()
    assert done == [0, 1]
    turns = Turns(work)
    assert [turns.go_on() for _ in range(4)] == [False, False, False, True]

    def fail(pause) -> None:
        raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own"):
        Turns(fail).go_on()
