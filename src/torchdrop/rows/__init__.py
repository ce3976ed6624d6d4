"""Which rows of a batch are kept, and how rows are taken out and added back."""
