"""`tubelet study`: a grid of SAEs trained and evaluated over existing stores, its tables and plots."""
