import torch, collections, sys
from minireflect.evaluate_reason import *
from minireflect.reason_stages import load_codec

c = load_codec(sys.argv[1])
cfg = ReasonEvaluation(pictures=240)
for split in ("held-out", "train"):
    cfg = ReasonEvaluation(pictures=240, split=split)
    ps = evaluation_prompts(cfg)
    ch = choices(1000, "evaluate", "codec")
    im = torch.stack([render(p.scene(ch)) for p in ps])
    bad = collections.Counter()
    n = collections.Counter()
    why = []
    outs = inspect_all(torch.cat([c.pictures(c.words(x)) for x in im.split(64)]))
    for p, r in zip(ps, outs):
        k = p.task.kind if p.task else p.law
        n[k] += 1
        if not p.fulfilled_by(r):
            bad[k] += 1
            why.append((p.text[:60], r.why or str(r.scene.objects)[:120]))
    print(split, {k: (bad[k], n[k]) for k in n})
    for w in why[:12]:
        print("  ", w)
