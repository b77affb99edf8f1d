"""Convert a folder of save_pretrained to a .pt file of the official PyTorch code."""

from recurrent_gemma_hf.conversion.convert import hf_to_official, main

if __name__ == "__main__":
    main(hf_to_official, "torch", __doc__)
