"""Which ways to run a model are measured, and which may be chosen."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from hfms_cli.models.tuned import Choice
from hfms_cli.tune.candidates import Knobs, changes_answers, usable_cores
from hfms_cli.tune.roofline import Roofline, measure
from hfms_cli.types import LoadedInfo, ModelCard

INFO = LoadedInfo(
    engine="e", device="cpu", dtype="float32", tasks=("generate",), context_length=1, max_batch=1, memory_bytes=1
)
CARD = ModelCard(
    format="safetensors",
    model_type="m",
    architecture="M",
    tasks=("generate",),
    weights_bytes=1,
    parameters=100,
    dtype="bfloat16",
)
CHOICE = Choice(engine="e", device="cpu")


@pytest.mark.parametrize(
    ("choice", "made", "asked", "changes"),
    [
        ({}, "none", ("auto", "auto"), False),
        ({"dtype": "float32"}, "none", ("auto", "auto"), False),
        ({"dtype": "bfloat16"}, "none", ("auto", "auto"), False),  # the model's own
        ({"dtype": "float16"}, "none", ("auto", "auto"), True),
        ({"dtype": "float16"}, "none", ("float16", "auto"), False),  # the operator's
        ({"quantize": "int8"}, "int8", ("auto", "auto"), True),
        ({"quantize": "int8"}, "int8", ("auto", "int8"), False),
        ({}, "int8", ("auto", "auto"), False),  # the engine's options say so
    ],
)
def test_only_rounding_that_nobody_asked_for_changes_answers(choice, made, asked, changes):
    assert changes_answers(replace(CHOICE, **choice), replace(INFO, quantize=made), CARD, asked) is changes


def test_limits_vary_one_at_a_time_and_only_those_that_the_engine_has():
    varied = list(Knobs({"max_batch": 64, "prefill_tokens": 256}).vary(CHOICE, 16))
    assert [c.options for c in varied] == [
        *({"prefill_tokens": n} for n in (64, 128, 512)),
        *({"max_batch": n} for n in (16, 8)),
    ]
    alone = list(Knobs({"threads": 0, "prefill_tokens": 256}).vary(CHOICE, 1))
    assert {"threads": usable_cores()} in [c.options for c in alone]
    assert all("prefill_tokens" not in c.options for c in alone)


def test_the_roofline_is_what_memory_and_arithmetic_allow():
    machine = Roofline(bytes_per_second=1000.0, flops_per_second={"float32": 800.0})
    assert machine.one_stream(10) == 100.0
    assert machine.batched(4, "float32") == 100.0
    assert machine.one_stream(0) is machine.batched(0, "float32") is machine.batched(4, "bfloat16") is None


def test_the_roofline_is_measured_in_a_process_of_its_own():
    machine = measure()
    assert machine.bytes_per_second > 1e8
    assert all(rate > 1e8 for rate in machine.flops_per_second.values())
