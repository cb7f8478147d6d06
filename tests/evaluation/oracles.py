"Shared by the tests of label errors and photographs: a network that can be computed by hand"
import torch
from torch import nn

FACTS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}


class Colours(nn.Module):
    "Features: mean of each channel; logits: a linear map of them"
    def __init__(self, classes=24):
        super().__init__()
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(3, classes)
        with torch.no_grad():
            self.fc.weight.copy_(torch.linspace(-2, 2, 3 * classes).view(classes, 3).roll(5, 0))

    def forward(self, images): return self.fc(self.drop(images.mean((2, 3))))
