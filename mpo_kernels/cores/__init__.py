"""What a chain of cores [D_k, i_k, j_k, D_{k+1}] is: its shape, how it is found, what it may be.

Pure torch, no device, no plan.
"""
