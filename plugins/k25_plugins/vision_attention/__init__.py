"""`k25.VisionAttention`: bidirectional attention over all patches of one media item."""
