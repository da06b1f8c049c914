"""Models on the Hugging Face Hub, with the package huggingface_hub (extra `hub`).

model = HubModel.from_pretrained("USER/NAME")
push("runs/mine", "USER/NAME", private=True)
"""

from .model import HubModel, push

__all__ = ["HubModel", "push"]
