"""What other people's models and hosts need to call moe_fn."""
