"""The programs that run within a jail. They import only the standard library and each other, by their bare names."""
