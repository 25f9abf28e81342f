"""Our model behind lm-evaluation-harness: its Hugging Face backend with `generate_in_segments`."""

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from transformers import GenerationConfig, StoppingCriteriaList

from tspin.sampling import generate_in_segments


class SegmentedLM(HFLM):
    """HFLM whose greedy decoding lets rows leave a batch as they end; all else is lm-eval's own."""

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        temperature = generation_kwargs.get("temperature") or 0.0
        known = {"attention_mask", "temperature", "do_sample"}
        if temperature > 0 or generation_kwargs.get("do_sample") or generation_kwargs.keys() - known:
            return super()._model_generate(context, max_length, stop, **generation_kwargs)
        length = context.shape[1]
        end = self.tokenizer.eos_token_id
        configured = self.model.generation_config.eos_token_id
        settings = GenerationConfig(
            max_new_tokens=max_length - length,
            do_sample=False,
            eos_token_id=sorted({end, *(configured if isinstance(configured, list) else [configured or end])}),
            pad_token_id=self.tokenizer.pad_token_id,
        )
        texts = [text for text in stop if text != self.tokenizer.decode([end])]

        def stops(rows: int) -> StoppingCriteriaList:
            return stop_sequences_criteria(self.tokenizer, texts, length, rows)

        def has_stopped(tokens: list[int]) -> bool:
            written = self.tokenizer.decode(tokens)
            return any(text in written for text in texts)

        with torch.autocast(
            self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
        ):
            rows = generate_in_segments(
                self.model,
                context,
                generation_kwargs["attention_mask"],
                settings,
                stops if texts else None,
                has_stopped if texts else None,
            )
        width = max(map(len, rows))
        padded = [row + [self.tokenizer.pad_token_id] * (width - len(row)) for row in rows]
        return torch.cat([context, torch.tensor(padded, device=context.device)], dim=1)
