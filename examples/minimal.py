"""Eight seconds on two CPU cores, by `python examples/minimal.py`: a small model learns to count.

The line to look for is `linear_cross_entropy`. The logits of 32768 words appear nowhere.
"""

import torch
from torch import nn

from cce_ext import linear_cross_entropy

VOCAB, WIDTH = 32768, 128
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

embedding = nn.Embedding(VOCAB, WIDTH)
body = nn.GRU(WIDTH, WIDTH, batch_first=True)
classifier = nn.Linear(WIDTH, VOCAB, bias=False)
model = nn.ModuleList([embedding, body, classifier]).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

for step in range(41):
    # Each row counts to 32 by ones, twos or threes, from somewhere below 256.
    start, stride = torch.randint(256, (16, 1)), torch.randint(1, 4, (16, 1))
    tokens = (start + stride * torch.arange(32)).to(device)
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):  # in which the CUDA kernels work
        hidden, _ = body(embedding(tokens))
        loss = linear_cross_entropy(hidden, classifier.weight, tokens, shift=1)  # each position predicts the next token
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step:2}: loss {loss.item():.2f}")
