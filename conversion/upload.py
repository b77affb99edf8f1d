"""Upload a checkpoint folder to the Hugging Face Hub. The same call resumes an interrupted upload."""

from recurrent_gemma_hf.conversion.upload import main

if __name__ == "__main__":
    main()
