"""look.py WEIGHTS NAME [T...]: per kind right/planned/kept on held-out and train."""

import sys, torch, collections

torch.set_num_threads(int(__import__("os").environ.get("OMP_NUM_THREADS", "2")))
from minireflect.evaluate_reason import *
from minireflect.reason_stages import load_painter
from minireflect.streams import rng

W = sys.argv[1]
N = int(sys.argv[2])
temps = [float(t) for t in sys.argv[3].split(",")]
p = load_painter(W)
for split in sys.argv[4].split(",") if len(sys.argv) > 4 else ("held-out", "train"):
    for T in temps:
        c = ReasonEvaluation(pictures=N, split=split, sampling=SamplingConfig(temperature=T))
        pr = evaluation_prompts(c)
        imgs = []
        plans = []
        for i in range(0, len(pr), 64):
            d = p.draw([q.text for q in pr[i : i + 64]], c.sampling, rng(7, "look", i))
            imgs.append(p.pictures(d.codes))
            plans += [read_rationale(t) for t in p.thoughts(d)]
        rd = inspect_all(torch.cat(imgs))
        acc = collections.defaultdict(list)
        for q, r, pl in zip(pr, rd, plans):
            row = (
                q.fulfilled_by(r),
                pl is not None and pl.fulfils(q),
                pl.shown_in(r) if pl else None,
                r.readable,
            )
            acc[q.kind].append(row)
            acc[q.kind[:4] + "/" + (q.task.kind if q.task else q.law)].append(row)
            acc["all"].append(row)
        m = lambda v: sum(v) / max(1, len(v))
        print(split, "T", T, flush=True)
        for k in ["all", "physical", "unconventional", "arrangement"] + sorted(k for k in acc if "/" in k):
            v = acc[k]
            print(
                f"   {k:28s} n {len(v):4d} right {m([a for a, *_ in v]):.3f} plan {m([a[1] for a in v]):.3f} kept {m([a[2] for a in v if a[2] is not None]):.3f} readable {m([a[3] for a in v]):.3f}"
            )
