import sys, torch

torch.set_num_threads(1)
from minireflect.reason_stages import load_painter
from minireflect.config import preset
from minireflect.models.reasongen import *
from minireflect.rl.entropy import entropy_of
from minireflect.streams import rng

p = load_painter(sys.argv[1])
c = preset("cpu")
s = c.grpo.sampling
t = c.asked.draw(0, 128)(0)[0]
d = p.draw(t, s, rng(0, "e"))
with torch.no_grad():
    q = p.model.distributions(p.tokenizer(t), d.words, d.codes, s)
print(
    "text",
    entropy_of(q.text)[d.chosen].mean().item(),
    "image",
    (entropy_of(q.forms) + entropy_of(q.colors)).mean().item(),
)
