"""`k25.Router`: the experts of each token and their weights, from the router's logits."""
