"""REAL, or any objective of real.py, as the loss of TRL's GRPOTrainer: vLLM, DeepSpeed, LoRA, GPUs.
accelerate launch tests/scale_out/trl_real.py --model NAME --dataset NAME --objective real TRL_FLAGS
Of these, --beta is kl_ref of real.py, and those of TRL's own losses are idle (--epsilon ...)."""
import sys
from dataclasses import fields, make_dataclass
import torch
import trl
from datasets import Dataset
from transformers import AutoTokenizer
sys.path.append(sys.path[0] + "/../..")  # the folder of real.py
import real
OURS = "model dataset dataset_config split problem_column answer_column objective tau".split()
Own = make_dataclass("Own", [(f.name, f.type, f) for f in fields(real.Config) if f.name in OURS])

class Trainer(trl.GRPOTrainer):
    def __init__(self, own, args, m):
        if args.per_device_train_batch_size % args.num_generations:
            raise ValueError("--num_generations must divide --per_device_train_batch_size (groups)")
        args.beta = args.beta or 1e-30 * (own.objective == "trpa")  # TRL keeps the start if not 0
        how = {"dtype": m.dtype, "revision": m.model_revision} | (args.model_init_kwargs or {})
        args.model_init_kwargs = {"attn_implementation": m.attn_implementation} | how
        self.own, name = real.Config(**vars(own)), m.model_name_or_path or own.model
        tokenizer = AutoTokenizer.from_pretrained(name, revision=m.model_revision)
        self.problems = {tokenizer.decode(p["prompt_ids"]): p for p in real.load_problems(
            tokenizer, self.own, own.dataset, own.split)}
        data, peft = Dataset.from_dict({"prompt": [*self.problems]}), trl.get_peft_config(m)
        super().__init__(name, self.label, args, data, None, tokenizer, peft_config=peft,
                         quantization_config=trl.get_quantization_config(m))

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
        given = vars(self.own) | dict(logp=logp, mask=mask, labels=labels, ref_logp=ref)
        given["old_logp"] = x.get("old_per_token_logps", logp.detach())
        names = real.arguments(self.own.objective)
        given = {k: given[k] for k in names if given.get(k) is not None}
        loss = real.OBJECTIVES[self.own.objective](**given)
        loss = loss if ref is None else loss + self.beta * real.kl(logp, ref, mask)
        return loss / self.current_gradient_accumulation_steps  # dapo, real_bce: mean of means

if __name__ == "__main__":
    parser = trl.TrlParser((Own, trl.GRPOConfig, trl.ModelConfig))
    try:
        trainer = Trainer(*parser.parse_args_and_config())
    except (ValueError, OSError) as e:
        parser.exit(2, f"trl_real.py: error: {str(e).splitlines()[0]}\n")
    trainer.train(trainer.args.resume_from_checkpoint)
