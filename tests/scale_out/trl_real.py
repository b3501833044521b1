"""REAL, or any objective of real.py, as the loss of TRL's GRPOTrainer: vLLM, DeepSpeed, LoRA, GPUs.
accelerate launch tests/scale_out/trl_real.py --model NAME --dataset NAME --objective real TRL_FLAGS
Of these, --beta is kl_ref of real.py; those of TRL's losses are idle. An update is the mean of its
micro-batches and processes: exact for means over questions; dapo and real_bce weigh parts alike."""
import sys
from dataclasses import fields, make_dataclass

import torch
import trl
from datasets import Dataset
sys.path.append(sys.path[0] + "/../..")  # the folder of real.py
import real

OURS = "model dataset dataset_config split problem_column answer_column objective tau".split()
Flags = make_dataclass("Flags", [
    (f.name, f.type, f) for f in fields(real.Config) + fields(trl.ModelConfig)
    if f.name in OURS or any(word in f.name for word in ("peft", "lora", "dora"))])

class Trainer(trl.GRPOTrainer):
    def __init__(self, flags, args):
        if args.per_device_train_batch_size % args.num_generations:
            raise ValueError("--num_generations must divide --per_device_train_batch_size (groups)")
        self.ours = real.Config(**{k: v for k, v in vars(flags).items() if k in OURS})
        model, tokenizer = real.load_model(flags.model)
        problems = real.load_problems(tokenizer, self.ours, flags.dataset, flags.split)
        self.problems = {tokenizer.decode(p["prompt_ids"]): p for p in problems}
        args.beta = args.beta or 1e-30 * (flags.objective == "trpa")  # TRL keeps the start if not 0
        data, peft = Dataset.from_dict({"prompt": [*self.problems]}), trl.get_peft_config(flags)
        super().__init__(model, self.label, args, data, None, tokenizer, peft_config=peft)

    def label(self, prompts, completions, **_):
        rows = zip(map(self.problems.get, prompts), completions)
        return [float(real.is_correct(p["opening"] + text, p["answer"])) for p, text in rows]

    def _tokenize_prompts(self, prompts):
        return [self.problems[prompt]["prompt_ids"] for prompt in prompts], None, {}

    def _generate_and_score_completions(self, rows):  # so that TRL shuffles and splits whole groups
        batch = super()._generate_and_score_completions(rows).items()
        return {k: v.unflatten(0, (-1, self.num_generations)) if v.ndim else v for k, v in batch}

    def _compute_loss(self, model, x):
        ids = torch.cat([x["prompt_ids"], x["completion_ids"]], 2).flatten(0, 1)  # (Q G, T)
        attend = torch.cat([x["prompt_mask"], x["completion_mask"]], 2).flatten(0, 1)
        mask, labels = x["completion_mask"].bool(), x["advantages"] > 0  # uniform groups: all False
        logp = self._get_per_token_logps_and_entropies(model, ids, attend, mask.shape[2])[0]
        logp, ref = logp.view_as(mask), x.get("ref_per_token_logps")
        old, name = x.get("old_per_token_logps", logp.detach()), self.ours.objective
        tau = {"tau": self.ours.tau} if name.startswith("real") else {}
        loss = real.OBJECTIVES[name](logp, old, mask, labels, ref_logp=ref, **tau)
        loss = loss if ref is None else loss + self.beta * real.kl(logp, ref, mask)
        return loss / self.current_gradient_accumulation_steps

if __name__ == "__main__":
    parser = trl.TrlParser((Flags, trl.GRPOConfig))
    try:
        trainer = Trainer(*parser.parse_args_and_config())
    except (ValueError, OSError) as e:
        parser.exit(2, f"trl_real.py: error: {e}\n")
    trainer.train(trainer.args.resume_from_checkpoint)
