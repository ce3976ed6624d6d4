"""Draw which rows of a batch are kept, gather those rows, and add the results back."""
