import torch, collections

torch.set_num_threads(1)
from minireflect.evaluate_reason import *
from minireflect.rl.rewards import load_captioner

cap = load_captioner("WORK/study/captioner/weights")
c = ReasonEvaluation(pictures=240, split="train")
pr = [p for p in evaluation_prompts(c) if not p.task]
d = choices(0, "q")
sc = [p.scene(d) for p in pr]
im = torch.stack([render(s) for s in sc])
F = [false_rationale(p, s, "train", d) for p, s in zip(pr, sc)]
r = cap(im, F)
t = cap(im, [rationale(s, draw=d) for s in sc])
n = collections.Counter()
b = collections.Counter()
tb = collections.Counter()
ex = collections.defaultdict(list)
for p, s, f, v, w in zip(pr, sc, F, r.tolist(), t.tolist()):
    n[p.law] += 1
    b[p.law] += v >= 0.1
    tb[p.law] += w < 0.1
    if v >= 0.1:
        ex[p.law].append((s.objects, s.outcome, f, round(v, 2)))
print(n, b, tb)
for k in ex:
    print(k, *ex[k][:3], sep="\n   ")
