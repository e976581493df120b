/*
 * What the code of every resident probe begins with. Compiled for the running kernel: the
 * constants in capitals (offsets of struct task_struct, per-CPU offsets) are given on top of it.
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;
typedef signed char s8;
typedef short s16;
typedef int s32;
typedef long s64;
typedef _Bool bool;

#define true 1
#define false 0

#define __always_inline inline __attribute__((always_inline))
#define __handler __attribute__((no_caller_saved_registers, used))
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define barrier() __asm__ volatile("" ::: "memory")

/* struct pt_regs, arch/x86/include/asm/ptrace.h */
struct regs {
	u64 r15, r14, r13, r12, bp, bx;
	u64 r11, r10, r9, r8, ax, cx, dx, si, di;
	u64 orig_ax, ip, cs, flags, sp, ss;
};

/* What a probe sees. Everything is inlined: what is not used costs nothing. */
struct context {
	u64 di, si, dx, cx, r8, r9; /* at an entry */
	u64 sp;			    /* at an entry [sp] is the return address */
	u64 ax, rdx;		    /* at a return */
	const struct regs *regs;    /* where a probe asks for other registers */
	const u8 *task;
	const u64 *saved; /* at a return: what was kept at the entry */
	u32 cpu;
	u64 pc, bp; /* where a probe walks the stack */
	u64 ip;	    /* the probed address, where a probe asks for it */
	u64 duration_ns; /* at a return, where a probe asks for it */
};

/* A probe, in a data page of ours. The host writes it before the probe is reachable. */
struct probe {
	u64 counters; /* struct counters, per CPU */
	u64 slots;    /* return probes: struct slot[maxactive] */
	u32 maxactive;
	u32 hint; /* slot that was free last */
	u32 id;
	u32 slot_bytes;
	u64 address;
	u64 point;	    /* the address that was asked for: the jump can be a few bytes behind */
	struct probe *next; /* return probes */
	u64 spare;
};

struct counters {
	u64 hits, nmissed, nfaults, spare;
};

/* A call that has not returned yet. */
struct slot {
	u64 busy;
	u64 ret_addr;
	u64 place; /* where the return address lay on the stack */
	u64 task;  /* 0 while it is being filled, and when it is free */
	u64 tsc;
	struct probe *probe;
	u64 stub; /* the return address that names this slot: push $slot; jmp ... */
	u64 pid;  /* task's at the entry: it may be another's later */
	u64 saved[];
};

/* One CPU's ring, in a data page of ours. */
struct ring {
	u8 **chunks;	/* the slots, in pieces of the same size, which is a power of two */
	u64 tail;	/* the host has read what lies before: as the guest saw it last */
	u64 host_tail;	/* written by the host, this one first */
	u64 host_check; /* and this one after it: they differ while a write is under way */
};

/*
 * The same CPU's write position: number of the CPU << 48, plus the records written. The tails are
 * of the same form, so that they are compared and nothing else.
 */
struct position {
	u64 head;
	u64 lost;
};

struct record {
	u64 seq;
	u64 tsc;
	u64 pid_tgid;
	u32 probe;
	u16 cpu, flags;
	u64 comm[2];
};

struct return_record {
	struct record common;
	u64 ret_addr;
	u64 entry_tsc;
};

#define POSITION_BITS 48

long copy_from_kernel_nofault(void *to, const void *from, u64 size);
long copy_from_user_nofault(void *to, const void *from, u64 size);
long strncpy_from_kernel_nofault(char *to, const void *from, long count);
long strncpy_from_user_nofault(char *to, const void *from, long count);

/*
 * Behind a call: the return address that it has left below the stack is taken away. A function that
 * sleeps may keep old words in its frame, and would look as if it were to come back here.
 */
#define CALLED(call)                                                                               \
	({                                                                                         \
		typeof(call) result = call;                                                        \
		__asm__ volatile("movq $0, -8(%%rsp)" : "+r"(result)::"memory");                   \
		result;                                                                            \
	})

static __always_inline bool read_kernel(void *to, u64 from, u32 size)
{
	return !CALLED(copy_from_kernel_nofault(to, (const void *)from, size));
}

static __always_inline bool read_user(void *to, u64 from, u32 size)
{
	return !CALLED(copy_from_user_nofault(to, (const void *)from, size));
}

static __always_inline s64 string_kernel(char *to, u64 from, s64 size)
{
	return CALLED(strncpy_from_kernel_nofault(to, (const void *)from, size));
}

static __always_inline s64 string_user(char *to, u64 from, s64 size)
{
	return CALLED(strncpy_from_user_nofault(to, (const void *)from, size));
}

#define GS(type, at) (*(type __seg_gs *)(at))

static __always_inline void gs_increment(u64 at)
{
	__asm__ volatile("incq %0" : "+m"(GS(u64, at))::"cc");
}

static __always_inline void gs_add32(u64 at, s32 value)
{
	__asm__ volatile("addl %1, %0" : "+m"(GS(u32, at)) : "ri"(value) : "memory", "cc");
}

/* One instruction: an interrupt, or a move to another CPU, makes it fail or comes after it. */
static __always_inline bool gs_advance(u64 at, u64 from)
{
	bool done;

	__asm__ volatile("cmpxchgq %3, %2"
			 : "=@ccz"(done), "+a"(from), "+m"(GS(u64, at))
			 : "r"(from + 1)
			 : "memory");
	return done;
}

static __always_inline u64 read_tsc(void)
{
	u32 low, high;

	__asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
	return (u64)high << 32 | low;
}

/* Ticks to nanoseconds: the product has 128 bits. */
static __always_inline u64 ticks_ns(u64 ticks)
{
	u64 low, high;

	__asm__("mulq %3" : "=a"(low), "=d"(high) : "0"(ticks), "r"(NS_PER_TICK) : "cc");
	return high << 32 | low >> 32;
}

static __always_inline const u8 *current_task(void)
{
	return GS(const u8 *, CURRENT);
}

static __always_inline u32 current_cpu(void)
{
	return GS(u32, CPU_NUMBER);
}

static __always_inline void count_hit(const struct probe *p)
{
	gs_increment(p->counters);
}

static __always_inline void count_missed(const struct probe *p)
{
	gs_increment(p->counters + 8);
}

static __always_inline void count_fault(const struct probe *p)
{
	gs_increment(p->counters + 16);
}

/*
 * A handler that calls functions of the kernel must not be entered by a probe in one of them: the
 * hit is missed, as a hit inside a handler is with the kernel's own kprobes. The guard names the
 * task: one that an oops in a handler has killed keeps nobody else out. The address alone would
 * be the name of the next task there, too.
 */
static __always_inline u64 guard_of(u64 task)
{
	return task ^ *(const u32 *)(task + TASK_PID) * 0x9e3779b97f4a7c15UL;
}

static __always_inline bool enter_handler(const struct probe *p)
{
	const u64 guard = guard_of((u64)current_task());

	gs_add32(PREEMPT_COUNT, 1);
	barrier();
	if (unlikely(GS(volatile u64, GUARD) == guard)) {
		count_missed(p);
		gs_add32(PREEMPT_COUNT, -1);
		return false;
	}
	GS(volatile u64, GUARD) = guard;
	return true;
}

static __always_inline void leave_handler(void)
{
	GS(volatile u64, GUARD) = 0;
	barrier();
	gs_add32(PREEMPT_COUNT, -1);
}

/* How far the host has come; while it writes that, it is waited for, but not for long. */
static __always_inline u64 read_tail(const struct ring *ring)
{
	u32 n;

	for (n = 0; n < 1000; n++) {
		u64 tail = *(const volatile u64 *)&ring->host_tail;

		if (likely(tail == *(const volatile u64 *)&ring->host_check))
			return tail;
		__asm__ volatile("pause");
	}
	return ring->tail;
}

/*
 * A place in this CPU's ring, or 0. The position names its CPU, so that a task that is moved to
 * another one in between starts again.
 */
static __always_inline u8 *reserve(u64 positions, struct ring *rings, u64 slots, u64 chunk_slots,
				   u32 slot_bytes, bool overwrite, u64 *seq)
{
	struct ring *ring;
	u64 head;

	do {
		head = GS(volatile u64, positions);
		ring = rings + (head >> POSITION_BITS);
		if (!overwrite && unlikely(head - ring->tail >= slots)) {
			ring->tail = read_tail(ring);
			if (head - ring->tail >= slots) {
				gs_increment(positions + 8);
				return 0;
			}
		}
	} while (unlikely(!gs_advance(positions, head)));
	*seq = head + 1;
	return ring->chunks[(head & (slots - 1)) / chunk_slots] +
	       (head & (chunk_slots - 1)) * slot_bytes;
}

static __always_inline void fill_header(struct record *record, const struct probe *p,
					const u8 *task, u64 seq, u64 tsc)
{
	record->tsc = tsc;
	record->pid_tgid = *(const u64 *)(task + TASK_PID);
	record->probe = p->id;
	*(u32 *)&record->cpu = seq >> POSITION_BITS;
	record->comm[0] = *(const u64 *)(task + TASK_COMM);
	record->comm[1] = *(const u64 *)(task + TASK_COMM + 8);
}

/* The host takes a record for whole once it has its number. */
static __always_inline void commit(struct record *record, u64 seq)
{
	barrier();
	*(volatile u64 *)&record->seq = seq;
}

/* Take a return slot; 0 if all are in use. */
static __always_inline struct slot *take_slot(struct probe *p)
{
	u32 first = p->hint, n;

	for (n = 0; n < p->maxactive; n++) {
		u32 index = first + n;
		struct slot *slot;

		if (index >= p->maxactive)
			index -= p->maxactive;
		slot = (struct slot *)(p->slots + (u64)index * p->slot_bytes);
		if (!slot->busy) {
			u64 taken = 1;

			__asm__ volatile("xchgq %0, %1"
					 : "+r"(taken), "+m"(slot->busy)::"memory");
			if (!taken) {
				p->hint = index;
				return slot;
			}
		}
	}
	return 0;
}

/* Where a call returns to in truth: another return probe's stub stands for the address it keeps. */
static __always_inline u64 true_return(u64 address)
{
	while (unlikely(address - WINDOW < WINDOW_BYTES))
		address = ((struct slot *)(s64) * (s32 *)(address + 1))->ret_addr;
	return address;
}

/* At a function's entry: have its return seen. */
static __always_inline struct slot *hook_return(struct probe *p, const struct context *c)
{
	struct slot *slot = take_slot(p);

	if (unlikely(!slot)) {
		count_missed(p);
		return 0;
	}
	slot->ret_addr = *(u64 *)c->sp;
	slot->place = c->sp;
	slot->tsc = read_tsc();
	slot->pid = *(const u32 *)(c->task + TASK_PID);
	barrier();
	*(volatile u64 *)&slot->task = (u64)c->task;
	return slot;
}

static __always_inline void arm_return(struct slot *slot, const struct context *c)
{
	barrier();
	*(volatile u64 *)c->sp = slot->stub;
}

static __always_inline void release_slot(struct slot *slot)
{
	barrier();
	*(volatile u64 *)&slot->task = 0;
	*(volatile u64 *)&slot->busy = 0;
}

#define MOST_HOOKED 32

extern struct probe *return_probes;
extern u64 window_used; /* bytes from its start; the rest is not mapped */

u32 stack_trace_save_regs(const struct regs *regs, u64 *to, u32 size, u32 skip);

/*
 * The kernel's unwinder ends at an address that is not of its own text: while it walks, calls of
 * this task that return probes wait for have their true return addresses on the stack.
 */
static __attribute__((noinline)) u32 walk_stack(const struct regs *regs, const u8 *task, u64 *to,
						u32 size)
{
	struct {
		u64 *place, others; /* all bits of what was there inverted, for the same reason */
	} hooked[MOST_HOOKED];
	u32 pid = *(const u32 *)(task + TASK_PID), count = 0, n, saved;
	struct probe *p;

	for (p = return_probes; p; p = p->next) {
		for (n = 0; n < p->maxactive && count < MOST_HOOKED; n++) {
			const struct slot *slot =
				(const struct slot *)(p->slots + (u64)n * p->slot_bytes);
			u64 *place = (u64 *)slot->place;

			/*
			 * A task that died may have left its slot to another of the same address.
			 * An interrupt may have come before the stub is in its place, or inside of
			 * it, when something else is there.
			 */
			if (slot->task != (u64)task || slot->pid != pid || *place != slot->stub)
				continue;
			hooked[count].place = place;
			hooked[count++].others = ~*place;
			*place = true_return(*place);
		}
	}
	barrier();
	for (n = saved = CALLED(stack_trace_save_regs(regs, to, size, 0)); n < size; n++)
		to[n] = 0;
	barrier();
	while (count--)
		*hooked[count].place = ~hooked[count].others;
	return saved;
}

/* The call stack, innermost first; what is left of its room is zeros. */
static __always_inline void save_stack(const struct context *c, u64 *to, u32 size)
{
	const struct regs made = {
		.bp = c->bp, .ip = c->pc, .cs = 0x10, .sp = c->sp, .ss = 0x18,
	};

	CALLED(walk_stack(c->regs ?: &made, c->task, to, size));
	to[0] = c->pc;
}

/*
 * A map on one CPU: places that are free, being filled, or those of a key, found by its hash. An
 * interrupt that meets a place being filled takes another one for the same key; the host adds up
 * what has the same key, on all CPUs.
 */
struct table {
	u64 *places;
	u64 lost; /* hits that found no place */
};

#define BEING_FILLED 2UL
#define FILLED 3UL
#define MOST_PROBES 256

static __always_inline void add_to(u64 *word, u64 value)
{
	__asm__ volatile("addq %1, %0" : "+m"(*word) : "er"(value) : "memory", "cc");
}

/* One instruction: no interrupt can come in between, and no other CPU writes to this table. */
static __always_inline bool change(u64 *word, u64 from, u64 to)
{
	bool done;

	__asm__ volatile("cmpxchgq %3, %2"
			 : "=@ccz"(done), "+a"(from), "+m"(*word)
			 : "r"(to)
			 : "memory");
	return done;
}

static __always_inline void raise_to(u64 *word, u64 value)
{
	u64 old;

	do {
		old = *(volatile u64 *)word;
	} while (value > old && !change(word, old, value));
}

/* Where a key's values are in a table, or 0 if there is no room. */
static u64 *find_values(struct table *table, const u64 *key, u32 key_words, u32 value_words,
			u32 count)
{
	u64 hash = 0x9e3779b97f4a7c15UL, n, at;

	for (n = 0; n < key_words; n++) {
		hash = (hash ^ key[n]) * 0x9e3779b97f4a7c15UL;
		hash ^= hash >> 32;
	}
	for (at = 0; at < count && at < MOST_PROBES; at++) {
		u64 *place = table->places +
			     (((hash >> 8) + at) & (count - 1)) * (1 + key_words + value_words);
		u64 state = *(volatile u64 *)place;

		if (!state && change(place, 0, BEING_FILLED)) {
			for (n = 0; n < key_words; n++)
				place[1 + n] = key[n];
			barrier();
			*(volatile u64 *)place = hash | FILLED;
			return place + 1 + key_words;
		}
		if (state != (hash | FILLED))
			continue;
		for (n = 0; n < key_words && place[1 + n] == key[n]; n++)
			;
		if (n == key_words)
			return place + 1 + key_words;
	}
	add_to(&table->lost, 1);
	return 0;
}

/* Key text: nothing but zeros behind its end. */
static __always_inline void clean_text(u8 *text, u32 size)
{
	u32 n;

	for (n = 0; n < size && text[n]; n++)
		;
	for (; n < size; n++)
		text[n] = 0;
}

/* Bucket of a histogram: negative, 0, 1, 2 and 3, 4 to 7, ... */
static __always_inline u32 power_bucket(u64 value, bool is_signed)
{
	if (is_signed && (s64)value < 0)
		return 0;
	return value ? 65 - __builtin_clzl(value) : 1;
}

static __always_inline u32 step_bucket(u64 value, bool is_signed, s64 least, s64 end, u64 step)
{
	if (!is_signed && (s64)value < 0)
		return (u64)(end - least) / step + 1;
	if ((s64)value < least)
		return 0;
	if ((s64)value >= end)
		return (u64)(end - least) / step + 1;
	return (value - (u64)least) / step + 1;
}

/*
 * A hit that the host has to see. The stop is a watchpoint on a word of ours: for a breakpoint TCG
 * drops all its translated code, for a watchpoint it does not.
 */
struct bell {
	u64 pending;
	u64 address;
	u64 cr3;
	u64 tsc;
	u64 given_up;
	u64 answer;
	struct regs regs;
};

/* The host's answer: go on as it is, with the registers that it has written, or where they say. */
#define BELL_GO_ON 0
#define BELL_GO_ON_WITH 1
#define BELL_GO_THERE 2

/* Of pending: an answered bell is in use until its vCPU has taken what the host has written. */
#define BELL_WAITS 1

/*
 * Called with interrupts off. Should no one answer, because kgdbx has died or nothing watches any
 * more, the guest goes on after a second of its own time; then after half of it, a quarter, and so
 * on, until someone answers again. Returns whether it goes on as the registers say.
 */
#define GIVEN_UP_MOST 5

static __always_inline int ring_bell(struct bell *bells, u64 *watched, struct regs *regs,
				     const struct probe *p)
{
	struct bell *bell = bells + current_cpu();
	u64 start = read_tsc(), patience = TSC_HZ >> bell->given_up, cr3, answer;
	u32 rounds = 0;

	if (unlikely(*(volatile u64 *)&bell->pending)) { /* a non-maskable interrupt */
		count_missed(p);
		return 0;
	}
	__asm__("mov %%cr3, %0" : "=r"(cr3));
	bell->address = p->address;
	bell->cr3 = cr3;
	bell->tsc = start;
	bell->regs = *regs;
	barrier();
	*(volatile u64 *)&bell->pending = BELL_WAITS;
	*(volatile u64 *)watched = p->address;
	while (*(volatile u64 *)&bell->pending == BELL_WAITS) {
		if (unlikely(read_tsc() - start > patience)) {
			*(volatile u64 *)&bell->pending = 0;
			count_missed(p);
			if (bell->given_up < GIVEN_UP_MOST)
				bell->given_up++;
			return 0;
		}
		/* One of several vCPUs that stop at once may go unnoticed. */
		if (!(++rounds & 0x3ff))
			*(volatile u64 *)watched = p->address;
		__asm__ volatile("pause");
	}
	bell->given_up = 0;
	answer = *(volatile u64 *)&bell->answer;
	bell->answer = BELL_GO_ON;
	if (answer != BELL_GO_ON)
		*regs = bell->regs;
	barrier();
	*(volatile u64 *)&bell->pending = 0;
	return answer == BELL_GO_THERE;
}
