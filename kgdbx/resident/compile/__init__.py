"""From probe definitions and C files to machine code for the guest."""
