"""One op in the place of stages: dispatch, experts and combine; the router."""
