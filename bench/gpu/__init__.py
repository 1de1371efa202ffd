"""The kernels: the gate of a device, decoding on it, and what compilers say without one."""
