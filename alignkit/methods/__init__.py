"""Methods (one short public file each) and the bridges to the Hugging Face trainers (``_*.py``)."""
