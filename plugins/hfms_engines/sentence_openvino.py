"""The transformer of a sentence-transformers model in OpenVINO: made in a process of its own, and run.

    python -m hfms_engines.sentence_openvino OUT < job

job: the JSON of `Job`, on one line. OUT: an empty folder, which holds the model when this succeeds. See `conversion`
for the process itself. The model is traced by OpenVINO's own front end, and compared with torch before it is kept.

Imports openvino and torch: for worker processes only.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hfms_cli import Device, LoadFailed, LoadRequest, ModelCard
from hfms_engines import sentence_torch
from hfms_engines.conversion import SENTENCES, converted, main, say
from hfms_engines.lean_openvino import ov
from hfms_engines.openvino_export import MODEL, quantize, share, shrink
from hfms_engines.openvino_runner import SHORT, precision_of
from hfms_engines.sentence_encoder import About, Encoder, Input
from hfms_engines.sentence_files import Recipe

Quantize = Literal["none", "int8"]

STEP = 8
"""For each new shape of a pass OpenVINO makes code, which for one short text takes as long as running it."""

# How far what was made may be from the model itself, in parts of it: in float32, and in eight bits.
_EXACT, _COARSE = 1e-3, 0.2
# How far vectors (by cosine) and scores may move for bfloat16 to be used where nobody asked for a precision.
_CLOSE = 5e-4, 0.01


class Job(msgspec.Struct):
    """What to make."""

    folder: str
    card: ModelCard
    device: Device
    quantize: Quantize


class Kept(msgspec.Struct):
    """What is said beside the model."""

    about: About
    half_is_close: bool
    """In bfloat16 it says nearly the same."""


class Runner:
    """A compiled model."""

    device = "cpu"
    step = STEP

    def __init__(self, compiled: Any, about: About, precision: str) -> None:
        self.about = about
        self.precision = precision
        self._request = compiled.create_infer_request()

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor | None) -> torch.Tensor:
        """What is returned is the caller's until the next pass."""
        inputs = [ids, mask] if types is None else [ids, mask, types]
        for i, tensor in enumerate(inputs):
            self._request.set_input_tensor(i, ov.Tensor(tensor.numpy()))
        self._request.infer()
        return torch.from_numpy(self._request.get_output_tensor(0).data)


def load(request: LoadRequest, quantize: Quantize, cache_dir: str) -> Runner:
    """Compile the model for this machine's CPU, after it was made where there is none yet. Raises LoadFailed."""
    core = ov.Core()
    precision_of(core, request.dtype)  # what cannot run here needs no conversion
    job = Job(str(request.folder), request.card, request.device, quantize)
    folder = converted(
        request.folder,
        job,
        modules=SENTENCES,
        variant=f"sentences-{quantize}",
        cache_dir=cache_dir,
        report=request.report,
    )
    return read(core, folder, request.dtype)


def read(core: Any, folder: Path, dtype: str) -> Runner:
    """The model in a conversion's folder, compiled. dtype: "auto", "float32" or "bfloat16"."""
    kept = msgspec.json.decode((folder / MODEL).with_suffix(".json").read_bytes(), type=Kept)
    precision = precision_of(core, "float32" if dtype == "auto" and not kept.half_is_close else dtype)
    return Runner(compiled(core, folder / MODEL, precision), kept.about, precision)


def compiled(core: Any, model: Any, precision: str) -> Any:
    """A model, or the file that it is in, compiled for this machine's CPU. Raises LoadFailed."""
    # Not pinned: a thread that is bound to a core waits for whoever else is there, the server or another model.
    how = {"INFERENCE_PRECISION_HINT": SHORT[precision], "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
    try:
        return core.compile_model(model, "CPU", how)
    except RuntimeError as exc:
        raise LoadFailed("openvino cannot compile this model.") from exc


def make(job: Job, out: Path) -> None:
    """Raises LoadFailed, and whatever transformers and OpenVINO raise."""
    transformers.logging.set_verbosity_error()
    say("reading the model with transformers")
    request = LoadRequest(folder=Path(job.folder), card=job.card, device=job.device)
    recipe = Recipe.read(request.folder, "score" if "score" in job.card.tasks else "embed")
    theirs = sentence_torch.load(recipe, request, "float32")
    say("converting it")
    made = _trace(theirs)
    if job.quantize == "int8":
        say("quantising it to eight bits")
        quantize(made, "int8", theirs.about.vocabulary)
    shrink(made)
    share(made)
    say("writing it")
    ov.save_model(made, out / MODEL, compress_to_fp16=False)

    def keep(half_is_close: bool) -> None:
        kept = Kept(theirs.about, half_is_close)
        (out / MODEL).with_suffix(".json").write_bytes(msgspec.json.encode(kept))

    keep(False)
    core = ov.Core()
    ours = read(core, out, "float32")
    error = _compare(theirs, ours, recipe)
    say(f"what it says differs by {error:.2%}")
    if not error < (_EXACT if job.quantize == "none" else _COARSE):
        raise LoadFailed(f"what it says differs by {error:.1%} from what transformers says.")
    if precision_of(core, "auto") == "bfloat16":
        moved, most = _move(recipe, request, ours, read(core, out, "bfloat16"))
        say(f"in bfloat16 its answers move by {moved:.1e}, and {most:.0e} are allowed")
        keep(moved < most)


def _trace(theirs: sentence_torch.Runner) -> Any:
    """The OpenVINO model of a batch of any size and length."""
    from openvino.tools.ovc import convert_model

    model = theirs.module.model
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register("hfms_finite", _attend)
        AttentionMaskInterface.register("hfms_finite", sdpa_mask)
        model.set_attn_implementation("hfms_finite")
    with torch.no_grad(), warnings.catch_warnings():
        # Its sizes become constants of the model, as they should.
        warnings.simplefilter("ignore")
        return convert_model(theirs.module, example_input=_example(theirs.about, rows=3, length=7))


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **how: Any
) -> tuple[torch.Tensor, None]:
    """transformers' own attention, with large numbers in place of infinite ones.

    Where a window has nothing but padding, torch gives zeros and OpenVINO gives what is not a number, which the next
    layer spreads over the whole text.
    """
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -1e30)
    return sdpa_attention_forward(module, query, key, value, mask, **how)  # type: ignore[no-any-return]


def _example(about: About, *, rows: int, length: int) -> tuple[torch.Tensor, ...]:
    """Ids, mask, and types where they are wanted; every other row is padded to half."""
    ids = (torch.arange(rows * length).reshape(rows, length) * 7919 + 11) % about.vocabulary
    mask = torch.ones_like(ids)
    mask[1::2, (length + 1) // 2 :] = 0
    types = torch.zeros_like(ids)
    types[:, length // 3 :] = 1
    return (ids, mask, types) if about.takes_types else (ids, mask)


def _compare(theirs: sentence_torch.Runner, ours: Runner, recipe: Recipe) -> float:
    """The largest difference between the two, in parts of what torch says; no batch has the size of the traced one."""
    about = theirs.about
    longest = min(n for n in (about.positions, about.learned_positions, 512) if n)
    errors = []
    for rows, length in ((1, 1), (5, min(33, longest)), (1, longest)):
        example = _example(about, rows=rows, length=length)
        with torch.inference_mode():
            said = [run(*example, *([None] if len(example) == 2 else [])) for run in (theirs, ours)]
        mine, yours = said if recipe.task == "score" else [states[example[1].bool()] for states in said]
        errors.append(float((yours - mine).norm() / mine.norm()))
    # Not max: it would pass over what is not a number.
    return float(np.max(errors))


def _move(recipe: Recipe, request: LoadRequest, exact: Runner, half: Runner) -> tuple[float, float]:
    """How far the vectors or scores of two runners are apart, and how far they may be."""
    one, other = (Encoder(recipe, request, runner) for runner in (exact, half))
    lengths = [n for n in (1, 3, 9, 27, 81, 243) if n <= one.max_length]
    words = exact.about.vocabulary
    batches = [[Input(0, [(i * 7919 + n) % words for i in range(n)], types=[0] * n)] for n in lengths]
    mine, yours = (torch.cat([encoder.encode(batch) for batch in batches]) for encoder in (one, other))
    if recipe.task == "score":
        return float((mine - yours).abs().max()), _CLOSE[1]
    return float(1 - torch.nn.functional.cosine_similarity(mine, yours).min()), _CLOSE[0]


if __name__ == "__main__":
    main(Job, make)
