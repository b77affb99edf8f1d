"""Convert a .pt file of the official PyTorch code to a folder that from_pretrained loads."""

from recurrent_gemma_hf.conversion.convert import main, official_to_hf

if __name__ == "__main__":
    main(official_to_hf, "torch", __doc__)
