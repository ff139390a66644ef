"""TRL's side of benchmarks/against_trl.py: GRPO steps of one model on given prompts, by a Python that has TRL.

Usage: python trl_step.py SETTINGS.json; prints one JSON object with the seconds of each step.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    wanted: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    answers = dict(zip(wanted["prompts"], wanted["answers"], strict=True))

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)

    def correctness(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        return [
            float(answers[prompt[-1]["content"]] in completion[-1]["content"])
            for prompt, completion in zip(prompts, completions, strict=True)
        ]

    samples = wanted["samples_per_prompt"]
    clock = Clock()
    trainer = GRPOTrainer(
        model=wanted["model"],
        reward_funcs=correctness,
        args=GRPOConfig(
            output_dir=wanted["output"], max_steps=wanted["steps"], num_generations=samples,
            per_device_train_batch_size=wanted["prompts_per_step"] * samples,
            max_completion_length=wanted["completion_tokens"], learning_rate=1e-5, beta=0.0, temperature=1.0,
            gradient_checkpointing=False, bf16=False, use_cpu=True, report_to=[], save_strategy="no",
            logging_steps=1, model_init_kwargs={"dtype": torch.float32}, seed=0,
        ),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in answers]),
        processing_class=AutoTokenizer.from_pretrained(wanted["model"]),
        peft_config=LoraConfig(
            r=wanted["lora_rank"], lora_alpha=2 * wanted["lora_rank"], target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    key = "completions/mean_length"
    lengths = [row[key] for row in trainer.state.log_history if key in row]
    told = {"seconds": clock.seconds, "completion_tokens": lengths, "threads": torch.get_num_threads()}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
