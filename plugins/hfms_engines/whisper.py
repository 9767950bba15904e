"""Whisper on its device: sound in, segments out, by transformers' own `generate`. For worker processes only."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from hfms_cli import BadRequest, ContextLengthExceeded, LoadFailed, LoadRequest, Recording, Segment, Speech
from hfms_engines.torch_runner import dtype_of, prepare, weights_bytes

Pause = Callable[[], None]
TOKENS_A_SECOND = 50
"""As which a second of sound counts: places that the encoder makes of it."""


class Whisper:
    """The model with what turns sound into its inputs, and tokens into text."""

    def __init__(self, request: LoadRequest, threads: int) -> None:
        """Raises LoadFailed."""
        prepare(threads)
        folder, common = str(request.folder), {"local_files_only": True}
        device = torch.device(request.device.torch_device or "cpu")
        self._processor = transformers.WhisperProcessor.from_pretrained(folder, **common)
        self.model = _Model.from_pretrained(
            folder,
            dtype=dtype_of(request, device),
            use_safetensors=request.card.format == "safetensors",
            weights_only=True,
            **common,
        )
        self.model.to(device).eval()
        self._config = self.model.generation_config
        if getattr(self._config, "no_timestamps_token_id", None) is None:
            raise LoadFailed("Its generation_config.json does not name the token `no_timestamps_token_id`.")
        self.rate: int = self._processor.feature_extractor.sampling_rate
        self._languages: dict[str, int] = getattr(self._config, "lang_to_id", None) or {}
        self.multilingual = bool(getattr(self._config, "is_multilingual", self._languages)) and bool(self._languages)
        self.dtype = str(self.model.dtype).removeprefix("torch.")
        self.context_length: int = self.model.config.max_target_positions

    def weights_bytes(self) -> int:
        return weights_bytes(self.model)

    def check(self, speech: Speech) -> None:
        """Raises BadRequest for what no sound could make right."""
        if not self.multilingual and (speech.translate or speech.language not in (None, "en", "english")):
            what = "translate" if speech.translate else f"hear `{speech.language}`"
            param = "model" if speech.translate else "language"
            raise BadRequest(f"This model knows English alone and cannot {what[:60]}.", param=param)
        if speech.language is not None and self.multilingual:
            self._code(speech.language)
        self._prompt(speech)

    def _code(self, language: str) -> str:
        code: str = TO_LANGUAGE_CODE.get(language.lower(), language.lower())
        if f"<|{code}|>" not in self._languages:
            raise BadRequest(f"This model does not know the language `{language[:40]}`.", param="language")
        return code

    def _prompt(self, speech: Speech) -> Any:
        """Ids of the prompt with its mark, or None."""
        if not speech.prompt.strip():
            return None
        try:
            ids = self._processor.get_prompt_ids(speech.prompt, return_tensors="pt")
        except ValueError as exc:
            raise BadRequest("The prompt has one of the model's special tokens in it.", param="prompt") from exc
        most = self.context_length // 2 - 1
        if len(ids) > most:
            raise ContextLengthExceeded(
                f"The prompt has {len(ids)} tokens, and this model takes {most}; shorten it, nothing is cut here.",
                param="prompt",
            )
        return ids.to(self.model.device)

    def transcribe(
        self,
        speech: Speech,
        sound: Any,
        temperature: float,
        begin: Callable[[Recording], None],
        hear: Callable[[Segment, int], None],
        pause: Pause,
    ) -> None:
        """Tell of a recording, and of each segment with the number of tokens that were made for it.

        sound: float32 [samples] at `rate`. pause: is called between two passes.
        """
        features, mask = self._features(sound)
        language = self._code(speech.language) if speech.language and self.multilingual else None
        asked: dict[str, Any] = {}
        if self.multilingual:
            language = language or self._heard_language(features)
            asked = {"language": language, "task": "translate" if speech.translate else "transcribe"}
        begin(Recording(len(sound) / self.rate, LANGUAGES.get(language or "en", language or "")))
        pause()
        if (prompt := self._prompt(speech)) is not None:
            asked["prompt_ids"] = prompt
        if speech.details:
            asked["no_speech_threshold"] = 2.0  # never skips, but tells the probability
        with _Model.watched(lambda window: self._tell(window, hear)):
            self.model.generate(
                input_features=features,
                attention_mask=mask,
                return_timestamps=True,
                return_segments=True,
                return_dict_in_generate=True,
                output_scores=True,
                temperature=temperature,
                num_beams=1,
                logits_processor=LogitsProcessorList([_Pausing(pause)]),
                logprob_threshold=float("-inf"),
                compression_ratio_threshold=float("inf"),
                **asked,
            )

    def _features(self, sound: Any) -> tuple[Any, Any]:
        """As transformers' pipeline makes them: a short recording fills a window, a long one is as long as it is."""
        extract = self._processor.feature_extractor
        long = len(sound) > extract.n_samples
        how = {"truncation": False, "padding": "longest"} if long else {}
        made = extract(sound, sampling_rate=self.rate, return_tensors="pt", return_attention_mask=True, **how)
        device = self.model.device
        return made["input_features"].to(device, self.model.dtype), made["attention_mask"].to(device)

    def _heard_language(self, features: Any) -> str:
        frames = 2 * self.model.config.max_source_positions
        token = int(self.model.detect_language(input_features=features[:, :, :frames], num_segment_frames=frames)[0])
        return next(name for name, id in self._languages.items() if id == token).strip("<|>")

    def _tell(self, window: Window, hear: Callable[[Segment, int], None]) -> None:
        likely = [
            float(torch.log_softmax(row.float(), -1)[token])
            for row, token in zip(window.scores, window.tokens, strict=False)
        ]
        decode = self._processor.tokenizer.decode
        whole = decode(window.tokens, skip_special_tokens=True).encode()
        for segment in window.segments:
            ids = segment["tokens"].tolist()
            told = Segment(
                start=round(float(segment["start"]), 3),
                end=round(float(segment["end"]), 3),
                text=decode(ids, skip_special_tokens=True),
                tokens=ids,
                seek=round(100 * window.begin),
                avg_logprob=sum(likely) / max(1, len(likely)),
                compression_ratio=len(whole) / len(zlib.compress(whole)),
                no_speech_prob=window.silence,
            )
            hear(told, len(ids))


@dataclass
class Window:
    """Half a minute of a recording, as `generate` has cut it."""

    segments: list[dict[str, Any]]
    tokens: list[int]
    scores: Sequence[Any]
    """Of each token, [vocabulary]."""
    begin: float
    """Seconds."""
    silence: float
    """How likely nobody speaks; 0 where that was not asked for."""


class _Watching(threading.local):
    """Of the call whose turn it is."""

    tell: Callable[[Window], None]
    processors: Sequence[Any] = ()


class _Model(transformers.WhisperForConditionalGeneration):  # type: ignore[misc]
    """transformers' own, which tells of each window as soon as it has been heard, and not at the end only.

    A window that would be heard again from the same place is passed over: a model can say for ever that it has heard
    nothing of it.
    """

    _watching = _Watching()

    @classmethod
    @contextmanager
    def watched(cls, tell: Callable[[Window], None]) -> Iterator[None]:
        cls._watching.tell, cls._watching.processors = tell, ()
        yield

    @staticmethod
    def _setup_no_speech_detection(logits_processor: Any, *args: Any) -> None:
        _Model._watching.processors = logits_processor
        transformers.WhisperForConditionalGeneration._setup_no_speech_detection(logits_processor, *args)

    @staticmethod
    def _retrieve_segment(**of: Any) -> tuple[Any, Any]:
        segments, offset = transformers.WhisperForConditionalGeneration._retrieve_segment(**of)
        row, which = of["idx"], of["prev_idx"]
        if offset <= 0:
            offset = of["seek_num_frames"][which]
        quiet = [p.no_speech_prob for p in _Model._watching.processors if hasattr(p, "no_speech_prob")]
        _Model._watching.tell(
            Window(
                segments=segments,
                tokens=of["seek_sequence"].tolist(),
                scores=of["seek_outputs"][row]["scores"],
                begin=float(of["time_offset"][which]),
                silence=float(quiet[0][row]) if quiet else 0.0,
            )
        )
        return segments, offset


class _Pausing(LogitsProcessor):  # type: ignore[misc]
    """Changes nothing; a pause comes before each token is chosen."""

    def __init__(self, pause: Pause) -> None:
        self._pause = pause

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self._pause()
        return scores
