"""What `k2dist bench` measures, each part a function that returns figures. The command line prints them."""
