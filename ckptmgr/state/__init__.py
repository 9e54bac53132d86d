"""Live objects to trees, trees to host memory and files, and all the way back."""
