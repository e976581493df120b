/*
 * What a C handler of kgdbx is compiled with, behind vmlinux.h where the kernel has BTF.
 *
 * A handler is called with interrupts off, before the probed function's first instruction:
 *
 *	int handler(struct pt_regs *regs)
 *
 * It must not sleep. What it changes in *regs is changed in the function, also if it returns 0.
 */
#ifndef KGDBX_HANDLER_H
#define KGDBX_HANDLER_H

#ifndef __VMLINUX_H__
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char s8;
typedef short s16;
typedef int s32;
typedef long long s64;
typedef _Bool bool;

/* arch/x86/include/asm/ptrace.h */
struct pt_regs {
	unsigned long r15, r14, r13, r12, bp, bx;
	unsigned long r11, r10, r9, r8, ax, cx, dx, si, di;
	unsigned long orig_ax, ip, cs, flags, sp, ss;
};
#endif

#ifndef NULL
#define NULL ((void *)0)
#endif

#define KGDBX_CONTINUE 0

/*
 * For a replacement, and for a handler that calls: the function as it is without kgdbx's jump.
 * Declare it with the function's own type: extern int kgdbx_original(int pid);
 */

/* return kgdbx_return(regs, value): the function returns value at once. */
static inline int kgdbx_return(struct pt_regs *regs, unsigned long value)
{
	regs->ax = value;
	regs->ip = *(unsigned long *)regs->sp;
	regs->sp += 8;
	return 1;
}

/*
 * The call stack of a handler's regs, innermost first, at most size addresses. Returns how many.
 * Calls that return probes wait for are shown with the addresses to which they return in truth.
 */
unsigned int kgdbx_stack(const struct pt_regs *regs, unsigned long *store, unsigned int size);

/* return kgdbx_jump(regs, address): another function of the same type runs in its place. */
static inline int kgdbx_jump(struct pt_regs *regs, unsigned long address)
{
	regs->ip = address;
	return 1;
}

#endif
