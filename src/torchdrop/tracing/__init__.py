"""Read one forward as a graph with torch.fx. Knows nothing of probabilities."""
