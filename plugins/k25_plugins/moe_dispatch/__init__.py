"""`k25.MoEDispatch`: each token through its top-k INT4 experts, summed with the router's weights."""
