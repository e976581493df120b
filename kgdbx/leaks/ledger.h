/*
 * The ledger of what watched modules allocated, kept in the guest: entered when an allocation has
 * succeeded, struck out before the real free. Constants in capitals are given on top of it.
 *
 * Whose a call is: any frame of its stack in a watched module. Most calls are nobody's, and have
 * no word on their stack that points into one: they cost a walk over the stack's words. For the
 * others the kernel's unwinder is asked, and what it says is remembered with the places on the
 * stack where its frames are: when the same addresses are at the same places, it is the same stack.
 */
#define NAMES 32
#define RANGES 64
#define UNWOUND 48
#define FRAMES 22
#define BUCKET_KEYS 7
#define LONGEST_SPILL 64
#define SEEN_WAYS 16
#define SHAPE 44
#define RECENT 64

struct watch_range {
	u64 start, size, module;
};

/* Written by the host while the guest stands, but for the counters. */
struct control {
	u64 low, span; /* all ranges lie there; nothing is watched if span is 0 */
	u64 seed;      /* of the stacks' numbers: a new one when code comes or goes */
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

/* A stack that was unwound: which addresses were where, in words from the stack pointer. */
struct seen {
	u64 key;
	u64 version; /* odd while it is being written */
	u64 stack;
	u64 count;
	u64 frames[SHAPE];
	u16 places[SHAPE];
	u8 spare[40];
};

/* The low bits of a stack's number, which is a hash of its frames, say what is known of it. */
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

/* push $slot: only such words in the window stand for a return address. */
static __always_inline bool is_stub(u64 word)
{
	return word - WINDOW < WINDOW_BYTES && !(word & 15) && *(const u8 *)word == 0x68;
}

/* Whether any word on the stack points into a watched module. */
static __always_inline bool is_anywhere(const u64 *sp)
{
	const u64 low = CONTROL_BLOCK->low, span = CONTROL_BLOCK->span;
	const u64 *end = stack_end(sp);

#pragma GCC unroll 4
	for (; sp < end; sp++)
		if (unlikely(*sp >= low) && *sp - low < span) /* most words are below: one comparison */
			return true;
	return false;
}

static __always_inline const struct slot *slot_of(u64 stub)
{
	return (const struct slot *)(s64) * (const s32 *)(stub + 1);
}

/* Whether a word on the stack is a return address, or stands for it until the return. */
static __always_inline bool returns_to(u64 word, u64 address)
{
	return word == address || (unlikely(word - WINDOW < WINDOW_BYTES) &&
				   is_stub(word) && true_return(word) == address);
}

static __always_inline u64 mix(u64 hash, u64 word)
{
	hash = (hash ^ word) * 0x9e3779b97f4a7c15UL;
	return hash ^ hash >> 29;
}

static __always_inline struct seen *seen_set(u64 key)
{
	return (struct seen *)SEEN + (key & (SEEN_SETS - 1)) * SEEN_WAYS;
}

/* A free under way, as far as it is known, of each task. */
struct recent {
	u64 task, sp, ret_addr, point;
};

static __always_inline struct recent *recent_call(const u8 *task)
{
	return (struct recent *)RECENT_CALLS + (u64)task / 64 % RECENT;
}

/* The frees inside of this one will be part of it, unless it is inside of another one itself. */
static __always_inline void note_recent(const struct probe *p, const u64 *sp)
{
	const u8 *task = current_task();
	struct recent *recent = recent_call(task);

	if (recent->task == (u64)task && recent->sp - (u64)sp < STACK_BYTES && recent->sp != (u64)sp &&
	    *(const u64 *)recent->sp == recent->ret_addr)
		return;
	recent->task = (u64)task;
	recent->sp = (u64)sp;
	recent->ret_addr = *sp;
	recent->point = p->point;
}

/* Whether the last free of this task is under way: where its return address is, 0 if it is not. */
static __always_inline const u64 *recent_place(const struct probe *p, const u64 *sp)
{
	const u8 *task = current_task();
	const struct recent *recent = recent_call(task);
	const u64 *at = (const u64 *)recent->sp;

	if (likely(recent->task != (u64)task || (u64)at - (u64)sp >= STACK_BYTES ||
		   *at != recent->ret_addr))
		return 0;
	/* What the same call frees again, in a loop, is not part of it. */
	return at == sp && recent->point == p->point ? 0 : at;
}

/*
 * Whether a frame of a stack is that of a watched call: of an allocation, whose return is awaited,
 * or of the last free. One that ended with a jump to another function has left nothing but its
 * return address.
 */
static __always_inline bool is_nested(const u64 *at, const u64 *recent)
{
	return at == recent ||
	       (unlikely(is_stub(*at)) &&
		slot_of(*at)->probe->id - CONTROL_BLOCK->first_probe < CONTROL_BLOCK->probes);
}

/* The number of a stack that was unwound before, 0 if it was not; and whether it is nested. */
static __slow u64 find_seen(const struct probe *p, u64 key, const u64 *sp, bool *nested)
{
	const struct seen *seen = seen_set(key), *end = seen + SEEN_WAYS;

	for (; seen < end; seen++) {
		u64 version, n, stack;
		const u64 *recent;

		if (!seen->key) /* filled from the front */
			return 0;
		if (seen->key != key)
			continue;
		version = *(const volatile u64 *)&seen->version;
		recent = recent_place(p, sp);
		*nested = false;
		for (n = 0; n < seen->count; n++) {
			const u64 *at = sp + seen->places[n];

			if (likely(*at == seen->frames[n])) {
				*nested |= at == recent;
				continue;
			}
			if (!returns_to(*at, seen->frames[n]))
				break;
			*nested |= is_nested(at, recent);
		}
		if (n < seen->count)
			continue;
		stack = seen->stack;
		barrier();
		if (!(version & 1) && *(const volatile u64 *)&seen->version == version)
			return stack;
	}
	return 0;
}

/*
 * Where the frames of a stack are on it, in words. The last one is left out: below an entry into
 * the kernel the stack begins at random.
 */
static __slow u32 find_places(const u64 *sp, const u64 *frames, u32 count, u16 *places)
{
	const u64 *at = sp, *end = stack_end(sp);
	u32 n;

	for (n = 1; n < count && n <= SHAPE; n++, at++) {
		if (frames[n] - ENTRY_TEXT < ENTRY_TEXT_BYTES && n > 1)
			break;
		while (at < end && !returns_to(*at, frames[n]))
			at++;
		if (at >= end)
			break;
		places[n - 1] = at - sp;
	}
	return n - 1;
}

static __slow bool remember(u64 key, u64 stack, const u64 *frames, const u16 *places, u32 count)
{
	struct seen *set = seen_set(key), *seen = set + (stack >> 16) % SEEN_WAYS;
	u64 version;
	u32 n;

	for (n = 0; n < SEEN_WAYS; n++) {
		if (!set[n].key) {
			seen = set + n;
			break;
		}
	}
	version = seen->version;
	if (version & 1 || !atomic_swap_from(&seen->version, version, version + 1))
		return false;
	for (n = 0; n < count; n++) {
		seen->places[n] = places[n];
		seen->frames[n] = frames[n + 1];
	}
	seen->count = count;
	seen->stack = stack;
	seen->key = key;
	barrier();
	*(volatile u64 *)&seen->version = version + 2;
	return true;
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

/* Unwind a stack, and tell the host of it if it is of a watched module. */
static __slow u64 learn(const struct probe *p, const u64 *sp, u64 bp, u64 key, bool *nested)
{
	u64 frames[UNWOUND], stack = CONTROL_BLOCK->seed;
	u32 n, count = unwind(p, sp, bp, frames), placed;
	u16 places[SHAPE];
	const u64 *recent;

	*nested = false;
	for (n = 0; n < count; n++)
		stack = mix(stack, frames[n]);
	stack = (stack & ~INFO) | KNOWN;
	for (n = 1; n < count; n++) {
		const struct watch_range *range = find_range(frames[n]);

		if (range) {
			stack |= OWNED | range->module << MODULE_SHIFT | (n == 1 ? DIRECT : 0);
			break;
		}
	}
	placed = CALLED(find_places(sp, frames, count, places));
	recent = recent_place(p, sp);
	for (n = 0; n < placed; n++)
		*nested |= is_nested(sp + places[n], recent);
	if (stack & OWNED && !*nested && !CALLED(say(p, STACK, stack, 0, 0, frames, count)))
		return stack;
	/* A nested one is not told of, and may be met when it is not nested. */
	if (placed + 2 >= count && !*nested)
		CALLED(remember(key, stack, frames, places, placed));
	return stack;
}

/* The number of a stack of a watched module, 0 if it is not of one, or part of another call. */
static __always_inline u64 look_at_stack(const struct probe *p, const u64 *sp, u64 bp)
{
	u64 key = mix(p->point, *sp) | 1, stack;
	bool nested;

	stack = CALLED(find_seen(p, key, sp, &nested));
	if (!stack && is_anywhere(sp))
		stack = CALLED(learn(p, sp, bp, key, &nested));
	return stack & OWNED && !nested ? stack : 0;
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

/* At the entry of an allocator. */
static __slow bool allocating(struct probe *p, const u64 *sp, u64 bp, u64 a1, u64 a2, u64 a3,
			      u64 a4)
{
	u64 stack = look_at_stack(p, sp, bp);
	const struct context c = { .sp = (u64)sp, .task = current_task() };
	struct slot *slot;

	if (!stack)
		return false;
	count_hit(p);
	slot = hook_return(p, &c);
	if (!slot)
		return false;
	slot->saved[0] = stack;
	slot->saved[1] = a1;
	slot->saved[2] = a2;
	slot->saved[3] = a3;
	slot->saved[4] = a4;
	arm_return(slot, &c);
	return true;
}

/* At the entry of what frees an address that was struck out. */
static __slow bool freed(struct probe *p, const u64 *sp, u64 bp, u64 address, u64 stack,
			 u64 session)
{
	struct control *control = CONTROL_BLOCK;
	u64 frames[UNWOUND];

	count_hit(p);
	note_recent(p, sp);
	if (session == control->session) {
		atomic_add(&control->frees[stack >> MODULE_SHIFT & (NAMES - 1)], 1);
		return true;
	}
	return CALLED(say(p, LATE, stack, address, session, frames, unwind(p, sp, bp, frames)));
}

/* At the entry of what frees an address that is not in the ledger. */
static __slow bool freed_unallocated(struct probe *p, const u64 *sp, u64 bp, u64 address,
				     bool quiet)
{
	u64 stack = look_at_stack(p, sp, bp);

	if (!stack)
		return false;
	count_hit(p);
	note_recent(p, sp);
	return quiet || CALLED(say(p, UNALLOCATED, stack, address, CONTROL_BLOCK->session, 0, 0));
}

/* Behind the frame pointer: the return to the stub, pp, and then the function's own stack. */
#define ENTRY_SP ((const u64 *)__builtin_frame_address(0) + 3)
#define ENTRY_BP (*(const u64 *)__builtin_frame_address(0))

#define ALLOCATOR(number, each, address_of, size_of, count_of)                                     \
	__handler void handler_##number(u64 a1, u64 a2, u64 a3, u64 a4, u64 a5, u64 a6, u64 pp)    \
	{                                                                                          \
		if (likely(CONTROL_BLOCK->span))                                                   \
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
		struct probe *p = (struct probe *)pp;                                              \
		const u64 *sp = ENTRY_SP;                                                          \
		u64 n, address, stack, session;                                                    \
                                                                                                   \
		for (n = 0; n < (u64)(count_of); n++) {                                            \
			address = each ? ((const u64 *)(address_of))[n] : (u64)(address_of);       \
			if (!is_memory(address))                                                   \
				continue;                                                          \
			if (unlikely(strike_out(address, &stack, &session)))                       \
				CALLED(freed(p, sp, ENTRY_BP, address, stack, session));           \
			else if (likely(CONTROL_BLOCK->span))                                      \
				CALLED(freed_unallocated(p, sp, ENTRY_BP, address, quiet));        \
		}                                                                                  \
	}
