"""What stands in the forward slot of a block, and runs it on the rows that are kept."""
