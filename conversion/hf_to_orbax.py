"""Convert a folder of save_pretrained to an Orbax checkpoint of the official JAX code."""

from recurrent_gemma_hf.conversion.convert import hf_to_official, main

if __name__ == "__main__":
    main(hf_to_official, "jax", __doc__)
