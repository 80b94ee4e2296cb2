"""Publishing adapters and models on the Hugging Face Hub."""
