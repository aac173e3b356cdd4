"""Sampling speed of ReasonGen-R1, compared with `generate` of transformers with the same weights.

    python benchmarks/reasongen.py [--pictures 64] [--repeats 5]

Both sample 108 tokens after a prompt, with a cache, from the full distribution.  Our model has separate
vocabularies for words and image tokens and adds position embeddings; theirs has one vocabulary.  Rates are
medians of alternating runs.  The last line is the time of complete pictures: rationale, image tokens and
decoding.  Needs the [test] dependencies.
"""

import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks.srrl import seconds
from minireflect.checkpoints.ours import load_pipeline
from minireflect.models.autoencoder import Codec, VQAutoencoder, VQConfig
from minireflect.models.reasongen import ReasonGen, ReasonGenConfig, SamplingConfig
from minireflect.models.transformer import Transformer
from minireflect.pipeline import ReasonPipeline
from minireflect.pretrain.sft import reason_tokenizer
from minireflect.streams import choices, rng
from minireflect.world.prompts import draw_prompts
from scripts.reports import described
from tests.parity.llama import llama


@torch.no_grad()
def in_one(model: ReasonGen) -> Transformer:
    """The transformer with one vocabulary of words and forms, for transformers.

    It has no colours, because `generate` cannot sample twice in a step.
    """
    sizes = model.config.transformer
    whole = Transformer(replace(sizes, vocabulary=sizes.vocabulary + model.config.forms))
    state, forms = model.transformer.state_dict(), model.forms()
    state["embed.weight"] = torch.cat([state["embed.weight"], forms.embeddings])
    state["head.weight"] = torch.cat([state["head.weight"], forms.heads])
    whole.load_state_dict(state)
    return whole


@torch.no_grad()
def main() -> int:
    parser = described(__doc__)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = reason_tokenizer(ReasonGenConfig.prompt)
    config = ReasonGenConfig(len(tokenizer), VQConfig.forms, VQConfig.colors)
    model = ReasonGen(config).eval()
    theirs = llama(in_one(model))
    codec = Codec(load_pipeline().autoencoder, VQAutoencoder(VQConfig()).eval())
    pipe = ReasonPipeline(model, tokenizer, codec)
    texts = [p.text for p in draw_prompts("physical", "train", args.pictures, choices(0, "benchmark"))]
    prompts, tokens = tokenizer(texts), config.rationale + config.side**2

    def ours() -> None:
        model.sample(prompts, SamplingConfig(), rng(0, "benchmark"))

    def generate() -> None:
        theirs.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, top_p=1.0,
            min_new_tokens=tokens, max_new_tokens=tokens,
        )  # fmt: skip

    def pictures() -> None:
        pipe.pictures(pipe.sample(texts, SamplingConfig(), rng(0, "benchmark")).codes)

    works = {"ours": ours, "transformers": generate, "pictures": pictures}
    timed = seconds(torch.device("cpu"), works, args.repeats)
    taken = {name: median(times) for name, times in timed.items()}
    total = args.pictures * tokens
    for name in ("ours", "transformers"):
        print(f"{name}: {taken[name]:.2f} s, {total / taken[name]:,.0f} tokens a second")
    print(f"ours / theirs: {taken['transformers'] / taken['ours']:.2f} times the tokens a second")
    threads = torch.get_num_threads()
    print(f"{args.pictures} pictures with rationales: {taken['pictures']:.2f} s on {threads} threads")
    return 0


if __name__ == "__main__":
    sys.exit(main())
