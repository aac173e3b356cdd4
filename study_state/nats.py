"""nats.py WEIGHTS: nats an image token of true pictures by law, train and held-out, given the true rationale."""

import sys, torch, collections
from minireflect.evaluate_reason import *
from minireflect.reason_stages import load_painter
from minireflect.methods.train_reasongen import as_words
from minireflect.world.rationales import rationale

torch.set_num_threads(1)
p = load_painter(sys.argv[1])
think = len(sys.argv) > 2
for split in ("train", "held-out"):
    c = ReasonEvaluation(pictures=160, split=split)
    pr = evaluation_prompts(c)
    ch = choices(5, "nats")
    sc = [q.scene(ch) for q in pr]
    im = torch.stack([render(s) for s in sc])
    codes = torch.cat([p.codec.words(x) for x in im.split(64)])
    acc = collections.defaultdict(list)
    for i in range(0, len(pr), 96):
        b = slice(i, i + 96)
        r = [rationale(s, draw=ch) for s in sc[b]]
        # dense: the rationale as prompt (the base), else prompt and rationale
        ids = p.tokenizer([q.text for q in pr[b]] if think else r)
        w = as_words(p.tokenizer, r if think else [""] * len(r), p.model.config)
        with torch.no_grad():
            d = p.model.distributions(ids, w, codes[b], SamplingConfig())
        t, f, cc = (
            p.model.chosen(d, w, codes[b])[0],
            *(v.gather(2, k[..., None])[..., 0] for v, k in zip(d[1:], p.model.split(codes[b]))),
        )
        for q, a, e in zip(pr[b], f, cc):
            for k in (q.task.kind if q.task else q.law, q.kind):
                acc[k].append((-a.sum().item(), -e.sum().item()))
    print(split, {k: tuple(round(sum(x) / len(v), 1) for x in zip(*v)) for k, v in acc.items()})
