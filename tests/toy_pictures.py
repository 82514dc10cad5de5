"""Pictures that take milliseconds to learn, for tests that train."""
import torch
from selfclass.data import ImageSet


def stripes(n=50):
    "Pictures of 8 x 8 pixels with stripes of three directions and some noise."
    g = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(8.), torch.arange(8.), indexing='ij')
    waves = torch.stack([torch.sin(1.5 * x), torch.sin(1.5 * y), torch.sin(1.1 * (x + y))])[torch.arange(n) % 3]
    ink = (127 + 90 * waves + 20 * torch.randn(n, 8, 8, generator=g)).clamp(0, 255).to(torch.uint8)
    return ImageSet('stripes', ink[:, None].expand(-1, 3, -1, -1).contiguous())
