"""Print the most likely classes of an image: python classify.py IMAGE. Needs torch and pillow."""

import json
import sys
from pathlib import Path

import torch
from PIL import Image

folder = Path(__file__).resolve().parent
model = torch.export.load(folder / "model.pt2").module()
classes = json.loads((folder / "classes.json").read_text())
# The garment must be light on a black ground.
image = Image.open(sys.argv[1]).convert("L").resize((28, 28))
pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(1, 28, 28)
scores = model(pixels).softmax(dim=1)[0].tolist()
for score, name in sorted(zip(scores, classes, strict=True), reverse=True)[:3]:
    print(f"{score:.4f} {name}")
