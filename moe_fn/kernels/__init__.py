"""What ops run on real tensors. Nothing here knows of autograd or torch.library."""
