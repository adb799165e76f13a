"""What runs within a jail. The files import nothing but the standard library and each other, by their bare names."""
