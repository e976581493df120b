/*
 * The ledger of what watched modules allocated, kept in the guest: entered when an allocation has
 * succeeded, struck out before the real free. Constants in capitals are given on top of it.
 *
 * Whose a call is: any frame of its stack in a watched module. Most calls are nobody's, and have
 * no word on their stack that points into one: they cost a walk over the stack's words. Of the
 * others the words that point to code are hashed; what the kernel's unwinder says of a stack is
 * remembered by that hash. So only new stacks are unwound.
 */
#define NAMES 32
#define RANGES 64
#define UNWOUND 48
#define FRAMES 22
#define BUCKET_KEYS 7
#define LONGEST_SPILL 64
#define SEEN_WAYS 8

struct watch_range {
	u64 start, size, module;
};

/* Written by the host while the guest stands, but for the counters. */
struct control {
	u64 low, span; /* all ranges lie there; nothing is watched if span is 0 */
	u64 seed;      /* of the hashes: a new one when code comes or goes */
	u64 session;
	u64 first_probe, probes; /* numbers of ours among the probes */
	u64 count;
	u64 full;     /* allocations that found no place */
	u64 replaced; /* addresses that were allocated again, with no free in between */
	u64 unsaid;   /* records that found their ring full */
	u64 allocations[NAMES], frees[NAMES];
	struct watch_range ranges[RANGES];
};

/* Keys apart from the rest: an address that is not here costs one cache line. */
struct bucket {
	u64 keys[BUCKET_KEYS];
	u64 spilled; /* keys that went on to later buckets */
};

struct block {
	u64 size;
	u64 stack;
	u64 tsc;
	u64 pid_tgid;
	u64 comm[2];
	u64 session;
	u64 flags;
};

struct watch_record {
	struct record common;
	u64 stack;
	u64 address;
	u32 what, count;
	u64 session;
	u64 frames[FRAMES];
};

enum { STACK, UNALLOCATED, LATE };

/* The low bits of a stack's hash say what is known of it. */
#define KNOWN 1UL
#define OWNED 2UL
#define DIRECT 4UL
#define MODULE_SHIFT 8
#define INFO 0xffffUL

#define FROM_INTERRUPT 1UL

#define CONTROL_BLOCK ((struct control *)CONTROL)
#define BUSY 1UL
#define __slow __attribute__((noinline, no_caller_saved_registers))

static __always_inline void atomic_add(u64 *at, u64 value)
{
	__asm__ volatile("lock addq %1, %0" : "+m"(*at) : "er"(value) : "memory", "cc");
}

static __always_inline bool atomic_swap_from(u64 *at, u64 from, u64 to)
{
	bool done;

	__asm__ volatile("lock cmpxchgq %3, %2"
			 : "=@ccz"(done), "+a"(from), "+m"(*at)
			 : "r"(to)
			 : "memory");
	return done;
}

/* NULL, ZERO_SIZE_PTR and ERR_PTR() are no memory. */
static __always_inline bool is_memory(u64 address)
{
	return address - 17 < -4096UL - 17;
}

static __always_inline u64 page_address(u64 page)
{
	return page ? (page - VMEMMAP) / PAGE_STRUCT_BYTES * 4096 + DIRECT_MAP : 0;
}

static __always_inline u64 cache_size(u64 cache)
{
	return *(const u32 *)(cache + OBJECT_SIZE);
}

/* Where the stack ends that sp is on; a handler of interrupts has one of its own. */
static __always_inline const u64 *stack_end(const u64 *sp)
{
	u64 base = *(const u64 *)(current_task() + TASK_STACK);
	u64 top;

	if ((u64)sp - base < STACK_BYTES)
		return (const u64 *)(base + STACK_BYTES);
	top = GS(u64, HARDIRQ_STACK);
	return top - (u64)sp < STACK_BYTES ? (const u64 *)top : sp;
}

/* Whether a watched module may be on the stack. */
static __always_inline bool may_be_watched(const u64 *sp)
{
	const u64 low = CONTROL_BLOCK->low, span = CONTROL_BLOCK->span;
	const u64 *end;

	if (*sp - low < span)
		return true;
	if (!span)
		return false;
	end = stack_end(sp);
#pragma GCC unroll 4
	for (sp++; sp < end; sp++)
		if (unlikely(*sp - low < span))
			return true;
	return false;
}

/* Whether a word on the stack is the stub that the return of a watched call goes to. */
static __always_inline bool is_our_return(const u64 *at)
{
	const u8 *stub = (const u8 *)*at;
	const struct slot *slot;

	if ((u64)stub - WINDOW >= WINDOW_BYTES || (u64)stub & 15 || *stub != 0x68)
		return false;
	slot = (const struct slot *)(s64) * (const s32 *)(stub + 1);
	if ((u64)slot - WINDOW >= WINDOW_BYTES || !slot->busy || slot->place != (u64)at)
		return false;
	return slot->probe->id - CONTROL_BLOCK->first_probe < CONTROL_BLOCK->probes;
}

/* Hash of what points to code on the stack, and where; 0 inside of another watched call. */
static __slow u64 hash_stack(const struct probe *p, const u64 *sp)
{
	const u64 *at, *end = stack_end(sp);
	u64 hash = CONTROL_BLOCK->seed ^ p->point;

	for (at = sp; at < end; at++) {
		u64 word = *at;

		if (word - TEXT < TEXT_BYTES || word - MODULES < WINDOW - MODULES) {
			hash = (hash ^ word ^ (u64)(end - at)) * 0x9e3779b97f4a7c15UL;
			hash ^= hash >> 29;
		} else if (unlikely(is_our_return(at))) {
			return 0;
		}
	}
	return (hash & ~INFO) | KNOWN;
}

static __always_inline u64 *seen_set(u64 hash)
{
	return (u64 *)SEEN + ((hash >> 16) & (SEEN_SETS - 1)) * SEEN_WAYS;
}

/* What is known of a stack, 0 if nothing. */
static __always_inline u64 find_seen(u64 hash)
{
	const u64 *set = seen_set(hash);
	u32 n;

	for (n = 0; n < SEEN_WAYS; n++)
		if ((set[n] ^ hash) <= INFO)
			return set[n];
	return 0;
}

static __always_inline void remember(u64 stack)
{
	u64 *set = seen_set(stack);
	u32 n;

	for (n = 0; n < SEEN_WAYS - 1 && set[n]; n++)
		;
	set[n] = stack;
}

static __always_inline const struct watch_range *find_range(u64 address)
{
	const struct control *control = CONTROL_BLOCK;
	u64 n;

	for (n = 0; n < control->count; n++)
		if (address - control->ranges[n].start < control->ranges[n].size)
			return &control->ranges[n];
	return 0;
}

static __slow bool say(const struct probe *p, u32 what, u64 stack, u64 address, u64 session,
		       const u64 *frames, u32 count)
{
	struct watch_record *record;
	u64 seq;
	u32 n;

	record = (struct watch_record *)reserve(@STREAM@, &seq);
	if (!record) {
		atomic_add(&CONTROL_BLOCK->unsaid, 1);
		return false;
	}
	fill_header(&record->common, p, current_task(), seq, read_tsc());
	record->stack = stack;
	record->address = address;
	record->what = what;
	record->session = session;
	record->count = count;
	for (n = 0; n < count && n < FRAMES; n++)
		record->frames[n] = frames[n];
	commit(&record->common, seq);
	return true;
}

/* The kernel's own unwinder, from a function's entry; what was interrupted is left out. */
static __always_inline u32 unwind(const struct probe *p, const u64 *sp, u64 bp,
				  u64 *frames)
{
	struct regs regs = { .ip = p->point, .sp = (u64)sp, .bp = bp, .cs = 0x10, .ss = 0x18 };
	u32 n, count = CALLED(walk_stack(&regs, current_task(), frames, UNWOUND));

	for (n = 1; n < count; n++)
		if (frames[n] - ENTRY_TEXT < ENTRY_TEXT_BYTES)
			return n + 1;
	return count;
}

/* Look at a stack that was not seen yet, and tell the host of it if it is of a watched module. */
static __slow u64 learn(const struct probe *p, const u64 *sp, u64 bp, u64 stack)
{
	u64 frames[UNWOUND];
	u32 n, count = unwind(p, sp, bp, frames);

	for (n = 1; n < count; n++) {
		const struct watch_range *range = find_range(frames[n]);

		if (range) {
			stack |= OWNED | range->module << MODULE_SHIFT | (n == 1 ? DIRECT : 0);
			break;
		}
	}
	if (!(stack & OWNED) || CALLED(say(p, STACK, stack, 0, 0, frames, count)))
		remember(stack);
	return stack;
}

static __always_inline u64 look_at_stack(const struct probe *p, const u64 *sp, u64 bp)
{
	u64 stack, hash = CALLED(hash_stack(p, sp));

	if (!hash)
		return 0;
	stack = find_seen(hash);
	if (!stack)
		stack = CALLED(learn(p, sp, bp, hash));
	return stack & OWNED ? stack : 0;
}

static __always_inline u64 bucket_of(u64 address)
{
	return ((address >> 3) * 0x9e3779b97f4a7c15UL) >> (64 - BUCKET_BITS);
}

static __always_inline struct bucket *bucket_at(u64 number)
{
	return (struct bucket *)BUCKETS + (number & ((1UL << BUCKET_BITS) - 1));
}

static __always_inline struct block *block_at(u64 number, u32 key)
{
	return (struct block *)BLOCKS + (number & ((1UL << BUCKET_BITS) - 1)) * BUCKET_KEYS + key;
}

static __always_inline void spilled(u64 first, u32 count, u64 change)
{
	u32 n;

	for (n = 0; n < count; n++)
		atomic_add(&bucket_at(first + n)->spilled, change);
}

/* Strike an address out. What was known of it is left in *was. */
static __always_inline bool strike_out(u64 address, u64 *stack, u64 *session)
{
	u64 first = bucket_of(address);
	u32 n, key;

	for (n = 0; n < LONGEST_SPILL; n++) {
		struct bucket *bucket = bucket_at(first + n);

		for (key = 0; key < BUCKET_KEYS; key++) {
			if (unlikely(bucket->keys[key] == address)) {
				*stack = block_at(first + n, key)->stack;
				*session = block_at(first + n, key)->session;
				if (!atomic_swap_from(&bucket->keys[key], address, 0))
					return false;
				spilled(first, n, -1);
				return true;
			}
		}
		if (likely(!bucket->spilled))
			return false;
	}
	return false;
}

static __slow bool enter_block(u64 address, u64 size, u64 stack)
{
	struct control *control = CONTROL_BLOCK;
	const u8 *task = current_task();
	u64 old_stack, old_session, first = bucket_of(address);
	u32 n, key;

	if (strike_out(address, &old_stack, &old_session))
		atomic_add(&control->replaced, 1);
	atomic_add(&control->allocations[stack >> MODULE_SHIFT & (NAMES - 1)], 1);
	for (n = 0; n < LONGEST_SPILL; n++) {
		struct bucket *bucket = bucket_at(first + n);

		for (key = 0; key < BUCKET_KEYS; key++) {
			struct block *block = block_at(first + n, key);

			if (bucket->keys[key] || !atomic_swap_from(&bucket->keys[key], 0, BUSY))
				continue;
			block->size = size;
			block->stack = stack;
			block->tsc = read_tsc();
			block->pid_tgid = *(const u64 *)(task + TASK_PID);
			block->comm[0] = *(const u64 *)(task + TASK_COMM);
			block->comm[1] = *(const u64 *)(task + TASK_COMM + 8);
			block->session = control->session;
			/* NMI_MASK, HARDIRQ_MASK, SOFTIRQ_OFFSET: include/linux/preempt.h */
			block->flags = GS(u32, PREEMPT_COUNT) & 0xff0100 ? FROM_INTERRUPT : 0;
			barrier();
			*(volatile u64 *)&bucket->keys[key] = address;
			return true;
		}
		atomic_add(&bucket->spilled, 1);
	}
	spilled(first, LONGEST_SPILL, -1);
	atomic_add(&control->full, 1);
	return false;
}

static __always_inline struct slot *await_return(struct probe *p, const u64 *sp, u64 stack)
{
	const struct context c = { .sp = (u64)sp, .task = current_task() };
	struct slot *slot = hook_return(p, &c);

	if (slot) {
		slot->saved[0] = stack;
		arm_return(slot, &c);
	}
	return slot;
}

/* At the entry of an allocator. */
static __slow bool allocating(struct probe *p, const u64 *sp, u64 bp, u64 a1, u64 a2, u64 a3,
			      u64 a4)
{
	u64 stack = look_at_stack(p, sp, bp);
	struct slot *slot;

	if (!stack)
		return false;
	count_hit(p);
	slot = await_return(p, sp, stack);
	if (!slot)
		return false;
	slot->saved[1] = a1;
	slot->saved[2] = a2;
	slot->saved[3] = a3;
	slot->saved[4] = a4;
	return true;
}

/* At the entry of what frees an address that was struck out (found), or was not there. */
static __slow bool freeing(struct probe *p, const u64 *sp, u64 bp, u64 address, bool found,
			   bool quiet, u64 old_stack, u64 session, bool watched)
{
	struct control *control = CONTROL_BLOCK;
	u64 stack;

	if (found && session != control->session) {
		u64 frames[UNWOUND];

		CALLED(say(p, LATE, old_stack, address, session, frames,
			   unwind(p, sp, bp, frames)));
	} else if (found) {
		atomic_add(&control->frees[old_stack >> MODULE_SHIFT & (NAMES - 1)], 1);
	}
	if (!watched)
		return false;
	stack = look_at_stack(p, sp, bp);
	if (!stack)
		return false;
	count_hit(p);
	if (!found && !quiet && is_memory(address))
		CALLED(say(p, UNALLOCATED, stack, address, control->session, 0, 0));
	/* Frees inside of this one are part of it. */
	return await_return(p, sp, stack);
}

/* Behind the frame pointer: the return to the stub, pp, and then the function's own stack. */
#define ENTRY_SP ((const u64 *)__builtin_frame_address(0) + 3)
#define ENTRY_BP (*(const u64 *)__builtin_frame_address(0))

#define ALLOCATOR(number, each, address_of, size_of, count_of)                                     \
	__handler void handler_##number(u64 a1, u64 a2, u64 a3, u64 a4, u64 a5, u64 a6, u64 pp)    \
	{                                                                                          \
		if (unlikely(may_be_watched(ENTRY_SP)))                                            \
			CALLED(allocating((struct probe *)pp, ENTRY_SP, ENTRY_BP, a1, a2, a3, a4)); \
	}                                                                                          \
	__handler void return_##number(struct slot *slot, u64 ret, u64 rdx, u64 *place)            \
	{                                                                                          \
		const u64 a1 = slot->saved[1], a2 = slot->saved[2];                                \
		const u64 a3 = slot->saved[3], a4 = slot->saved[4];                                \
		u64 n, address;                                                                    \
                                                                                                   \
		*place = slot->ret_addr;                                                           \
		(void)a1, (void)a2, (void)a3, (void)a4;                                            \
		for (n = 0; n < (u64)(count_of); n++) {                                            \
			address = each ? ((const u64 *)(address_of))[n] : (u64)(address_of);       \
			if (is_memory(address))                                                    \
				CALLED(enter_block(address, (size_of), slot->saved[0]));           \
		}                                                                                  \
		release_slot(slot);                                                                \
	}

#define RELEASER(number, each, address_of, quiet, count_of)                                        \
	__handler void handler_##number(u64 a1, u64 a2, u64 a3, u64 a4, u64 a5, u64 a6, u64 pp)    \
	{                                                                                          \
		const u64 *sp = ENTRY_SP;                                                          \
		bool watched = may_be_watched(sp);                                                 \
		u64 n, address, stack, session;                                                    \
                                                                                                   \
		for (n = 0; n < (u64)(count_of); n++) {                                            \
			bool found;                                                                \
                                                                                                   \
			address = each ? ((const u64 *)(address_of))[n] : (u64)(address_of);       \
			stack = session = 0;                                                       \
			found = is_memory(address) && strike_out(address, &stack, &session);                             \
			if (unlikely(found || watched))                                            \
				CALLED(freeing((struct probe *)pp, sp, ENTRY_BP, address, found,   \
					       quiet, stack, session,                              \
					       watched && n == (u64)(count_of) - 1));              \
		}                                                                                  \
	}                                                                                          \
	__handler void return_##number(struct slot *slot, u64 ret, u64 rdx, u64 *place)            \
	{                                                                                          \
		*place = slot->ret_addr;                                                           \
		release_slot(slot);                                                                \
	}
