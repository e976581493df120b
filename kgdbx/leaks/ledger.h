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
	u64 jiffies;
	u64 pid_tgid;
	u64 comm[2];
	u64 session;
	u64 order; /* << 1, and whether it was in an interrupt */
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
	u64 depth; /* the highest place: a stack that is less deep is another one */
	u64 frames[SHAPE];
	u16 places[SHAPE];
	u8 spare[32];
};

/* The low bits of a stack's number, which is a hash of its frames, say what is known of it. */
#define TOLD 1UL
#define OWNED 2UL
#define DIRECT 4UL
#define MODULE_SHIFT 8
#define INFO 0xffffUL
#define NOT_LOOKED_AT TOLD /* no stack's: one of nobody is 0 */

#define CONTROL_BLOCK ((struct control *)CONTROL)
#define BUSY 1UL
#define __slow __attribute__((noinline, no_caller_saved_registers))

static __always_inline void atomic_add(u64 *at, u64 value)
{
	__asm__ volatile("lock addq %1, %0" : "+m"(*at) : "er"(value) : "memory", "cc");
}

static __always_inline u64 atomic_fetch_add(u64 *at, u64 value)
{
	__asm__ volatile("lock xaddq %0, %1" : "+r"(value), "+m"(*at) : : "memory", "cc");
	return value;
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

/*
 * Where the stack ends that sp is on, without the registers of user mode above it; a handler of
 * interrupts has one of its own.
 */
static __always_inline const u64 *stack_end(const u64 *sp)
{
	u64 base = *(const u64 *)(current_task() + TASK_STACK);
	u64 top;

	if ((u64)sp - base < STACK_BYTES)
		return (const u64 *)(base + STACK_BYTES - sizeof(struct regs));
	top = GS(u64, HARDIRQ_STACK);
	return top - (u64)sp < STACK_BYTES ? (const u64 *)top : sp;
}

/* What a return stub names: push $slot. */
static __always_inline const struct slot *slot_of(u64 stub)
{
	return (const struct slot *)(s64) * (const s32 *)(stub + 1);
}

/*
 * Whether a word on a stack stands for a return address. It may be any number: nothing is read but
 * what is mapped, and ours.
 */
static __always_inline bool is_stub(u64 word)
{
	const struct slot *slot;

	if (word - WINDOW >= window_used || (word & 15) || *(const u8 *)word != 0x68)
		return false;
	slot = slot_of(word);
	return (u64)slot - WINDOW < window_used - sizeof(*slot) && slot->stub == word;
}

/* How many of eight words are below an address: two instructions each, and no jumps. */
static __always_inline u64 count_below(const u64 *words, u64 address)
{
	return (words[0] < address) + (words[1] < address) + (words[2] < address) +
	       (words[3] < address) + (words[4] < address) + (words[5] < address) +
	       (words[6] < address) + (words[7] < address);
}

/* Whether any word on the stack points into a watched module; nearly all words lie below. */
static __always_inline bool is_anywhere(const u64 *sp, const u64 *end)
{
	const u64 low = CONTROL_BLOCK->low, span = CONTROL_BLOCK->span;
	const u64 *next;

	while (sp < end) {
		next = sp + 8;
		if (likely(next <= end)) {
			if (likely(count_below(sp, low) == 8)) {
				sp = next;
				continue;
			}
		} else {
			next = end;
		}
		for (; sp < next; sp++)
			if (unlikely(*sp - low < span))
				return true;
	}
	return false;
}

/* Whether a word on the stack is a return address, or stands for it until the return. */
static __always_inline bool returns_to(u64 word, u64 address)
{
	u32 n;

	/* What is left of earlier calls may lead anywhere. */
	for (n = 0; n < MOST_HOOKED && unlikely(word - WINDOW < WINDOW_BYTES) && is_stub(word); n++)
		word = slot_of(word)->ret_addr;
	return word == address;
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

/* The last free on a stack; it may be under way. Only who is on that stack writes to it. */
struct recent {
	u64 end; /* of the stack: a task's, or that of a CPU's interrupts */
	u64 sp, ret_addr, point;
	u64 jiffies;
	u64 spare[3];
};

static __always_inline struct recent *recent_set(u64 end)
{
	return (struct recent *)RECENT_CALLS +
	       ((end * 0x9e3779b97f4a7c15UL) >> (64 - RECENT_BITS)) * RECENT_WAYS;
}

static __always_inline struct recent *find_recent(u64 end)
{
	struct recent *recent = recent_set(end);
	u32 n;

	for (n = 0; n < RECENT_WAYS && recent->end; n++, recent++) /* filled from the front */
		if (recent->end == end)
			return recent;
	return 0;
}

static __always_inline bool is_under_way(const struct recent *recent, const u64 *sp)
{
	return recent->sp - (u64)sp < recent->end - (u64)sp &&
	       *(const u64 *)recent->sp == recent->ret_addr;
}

/* A place for a stack that has none: that of the one that was used last the longest time ago. */
static __slow struct recent *take_recent(u64 end)
{
	struct recent *set = recent_set(end), *oldest;
	u32 tries, n;

	for (tries = 0; tries < 8; tries++) {
		u64 was;

		for (n = 0, oldest = set; n < RECENT_WAYS && oldest->end; n++)
			if (!set[n].end || set[n].jiffies < oldest->jiffies)
				oldest = set + n;
		was = *(const volatile u64 *)&oldest->end;
		if (atomic_swap_from(&oldest->end, was, end))
			return oldest;
	}
	return 0;
}

/* The frees inside of this one will be part of it, unless it is inside of another one itself. */
static __always_inline void note_recent(const struct probe *p, const u64 *sp)
{
	u64 end = (u64)stack_end(sp);
	struct recent *recent = find_recent(end);

	if (unlikely(!recent && end != (u64)sp)) /* of a stack that is known */
		recent = CALLED(take_recent(end));
	if (!recent || (recent->sp != (u64)sp && is_under_way(recent, sp)))
		return;
	recent->sp = (u64)sp;
	recent->ret_addr = *sp;
	recent->point = p->point;
	recent->jiffies = *(const volatile u64 *)JIFFIES;
}

/* Whether the last free on this stack is under way: where its return address is, 0 if not. */
static __always_inline const u64 *recent_place(const struct probe *p, const u64 *sp, const u64 *end)
{
	const struct recent *recent = find_recent((u64)end);

	if (!recent || !is_under_way(recent, sp))
		return 0;
	/* What the same call frees again, in a loop, is not part of it. */
	if (recent->sp == (u64)sp && recent->point == p->point)
		return 0;
	return (const u64 *)recent->sp;
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

/*
 * Whether what is on the stack are the frames of one that was unwound.
 * *hooked: whether a call that a return probe waits for is among them
 */
static __always_inline bool is_same(const struct seen *seen, const u64 *sp, bool *hooked)
{
	const u16 *places = seen->places, *end = places + seen->count;
	const u64 *frames = seen->frames;

	for (*hooked = false; places < end; places++, frames++) {
		if (likely(sp[*places] == *frames))
			continue;
		if (!returns_to(sp[*places], *frames))
			return false;
		*hooked = true;
	}
	return true;
}

/* Whether a call is inside of another one that is watched. */
static __slow bool is_part(const struct seen *seen, const u64 *sp, const u64 *recent)
{
	u64 n;

	for (n = 0; n < seen->count; n++)
		if (is_nested(sp + seen->places[n], recent))
			return true;
	return false;
}

/* Whether a stack was unwound before; what look_at_stack() says of it then. */
static __always_inline bool find_seen(const struct probe *p, u64 key, const u64 *sp,
				      const u64 *stack_end, u64 *stack)
{
	const struct seen *seen = seen_set(key), *end = seen + SEEN_WAYS;

	for (; seen < end && seen->key; seen++) { /* filled from the front */
		const u64 *recent;
		bool hooked;
		u64 version;

		if (seen->key != key || seen->depth >= (u64)(stack_end - sp))
			continue;
		version = *(const volatile u64 *)&seen->version;
		*stack = seen->stack;
		if (!is_same(seen, sp, &hooked))
			continue;
		barrier();
		if (version & 1 || *(const volatile u64 *)&seen->version != version)
			continue;
		if (!(*stack & OWNED))
			*stack = 0;
		else if (recent = recent_place(p, sp, stack_end), unlikely(hooked || recent))
			*stack = CALLED(is_part(seen, sp, recent)) ? 0 : *stack;
		/* As a part of another call it was not told of. */
		return likely(!*stack || *stack & TOLD);
	}
	return false;
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
		/* The same frames may be at other places, but what was not told of is now. */
		if (!set[n].key ||
		    (stack & TOLD && set[n].key == key && set[n].stack == (stack & ~TOLD))) {
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
	seen->depth = count ? places[count - 1] : 0;
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

/*
 * The kernel's own unwinder, from a function's entry. What was interrupted is left out, and what has
 * called softirqs or the scheduler: these do the work of others.
 */
static __always_inline u32 unwind(const struct probe *p, const u64 *sp, u64 bp,
				  u64 *frames)
{
	struct regs regs = { .ip = p->point, .sp = (u64)sp, .bp = bp, .cs = 0x10, .ss = 0x18 };
	u32 n, count = CALLED(walk_stack(&regs, current_task(), frames, UNWOUND));

	for (n = 1; n < count; n++)
		if (IS_BORDER(frames[n]))
			return n + 1;
	return count;
}

/* Unwind a stack, and tell the host of it if it is of a watched module: its number then, or 0. */
static __slow u64 learn(const struct probe *p, const u64 *sp, u64 bp, u64 key)
{
	u64 frames[UNWOUND], stack = CONTROL_BLOCK->seed;
	u32 n, count = unwind(p, sp, bp, frames), placed;
	const u64 *recent = recent_place(p, sp, stack_end(sp));
	u16 places[SHAPE];
	bool part = false;

	for (n = 0; n < count; n++)
		stack = mix(stack, frames[n]);
	stack &= ~INFO;
	for (n = 1; n < count; n++) {
		const struct watch_range *range = find_range(frames[n]);

		if (range) {
			stack |= OWNED | range->module << MODULE_SHIFT | (n == 1 ? DIRECT : 0);
			break;
		}
	}
	placed = CALLED(find_places(sp, frames, count, places));
	for (n = 0; n < placed; n++)
		part |= is_nested(sp + places[n], recent);
	/* A part is not told of: it is when it is met as none. */
	if (stack & OWNED && !part) {
		stack |= TOLD;
		if (!CALLED(say(p, STACK, stack, 0, 0, frames, count)))
			return stack;
	}
	if (placed + 2 >= count)
		CALLED(remember(key, stack, frames, places, placed));
	return stack & TOLD ? stack : 0;
}

/* The number of a stack of a watched module, 0 if it is not of one, or part of another call. */
static __always_inline u64 look_at_stack(const struct probe *p, const u64 *sp, u64 bp)
{
	const u64 *end = stack_end(sp);
	u64 key = mix(p->point, *sp) | 1, stack;

	if (find_seen(p, key, sp, end, &stack))
		return stack;
	return likely(!is_anywhere(sp, end)) ? 0 : CALLED(learn(p, sp, bp, key));
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

/* Where an address is in the ledger; false if it is not. */
static __always_inline bool find_address(u64 address, u64 *number, u32 *key)
{
	u64 first = bucket_of(address);
	u32 n;

	for (n = 0; n < LONGEST_SPILL; n++) {
		const struct bucket *bucket = bucket_at(first + n);

		*number = first + n;
		for (*key = 0; *key < BUCKET_KEYS; ++*key)
			if (unlikely(bucket->keys[*key] == address))
				return true;
		if (likely(!bucket->spilled))
			return false;
	}
	return false;
}

/* Strike an address out. What was known of it is left in *was. */
static __always_inline bool strike_out(u64 address, u64 *stack, u64 *session)
{
	u64 number;
	u32 key;

	if (!find_address(address, &number, &key))
		return false;
	*stack = block_at(number, key)->stack;
	*session = block_at(number, key)->session;
	if (!atomic_swap_from(&bucket_at(number)->keys[key], address, 0))
		return false;
	spilled(bucket_of(address), number - bucket_of(address), -1);
	return true;
}

/* hook_return() without the time of the call. */
static __always_inline struct slot *await_return(struct probe *p, const u64 *sp)
{
	struct slot *slot = take_slot(p);
	const u8 *task = current_task();

	if (unlikely(!slot)) {
		count_missed(p);
		return 0;
	}
	slot->ret_addr = *sp;
	slot->place = (u64)sp;
	slot->pid = *(const u32 *)(task + TASK_PID);
	barrier();
	*(volatile u64 *)&slot->task = (u64)task;
	return slot;
}

static __always_inline void fill_block(struct block *block, u64 size, u64 stack, u64 order)
{
	const u8 *task = current_task();

	block->size = size;
	block->stack = stack;
	block->jiffies = *(const volatile u64 *)JIFFIES; /* reading the TSC takes as long as the rest */
	block->pid_tgid = *(const u64 *)(task + TASK_PID);
	block->comm[0] = *(const u64 *)(task + TASK_COMM);
	block->comm[1] = *(const u64 *)(task + TASK_COMM + 8);
	block->session = CONTROL_BLOCK->session;
	/* NMI_MASK, HARDIRQ_MASK, SOFTIRQ_OFFSET: include/linux/preempt.h */
	block->order = order << 1 | !!(GS(u32, PREEMPT_COUNT) & 0xff0100);
}

static __always_inline bool enter_block(u64 address, u64 size, u64 stack)
{
	struct control *control = CONTROL_BLOCK;
	u64 old_stack, old_session, first = bucket_of(address), order;
	u32 n, key;

	if (unlikely(strike_out(address, &old_stack, &old_session)))
		atomic_add(&control->replaced, 1);
	order = atomic_fetch_add(&control->allocations[stack >> MODULE_SHIFT & (NAMES - 1)], 1);
	for (n = 0; n < LONGEST_SPILL; n++) {
		struct bucket *bucket = bucket_at(first + n);

		for (key = 0; key < BUCKET_KEYS; key++) {
			if (bucket->keys[key] || !atomic_swap_from(&bucket->keys[key], 0, BUSY))
				continue;
			fill_block(block_at(first + n, key), size, stack, order);
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
static __always_inline void allocating(struct probe *p, const u64 *sp, u64 bp, u64 a1, u64 a2,
				       u64 a3, u64 a4)
{
	u64 stack = look_at_stack(p, sp, bp);
	struct slot *slot;

	if (likely(!stack))
		return;
	count_hit(p);
	slot = await_return(p, sp);
	if (unlikely(!slot))
		return;
	slot->saved[0] = stack;
	slot->saved[1] = a1;
	slot->saved[2] = a2;
	slot->saved[3] = a3;
	slot->saved[4] = a4;
	barrier();
	*(volatile u64 *)sp = slot->stub;
}

/* At the entry of what may give a block another size where it is. */
static __slow bool resizing(struct probe *p, const u64 *sp, u64 address, u64 size)
{
	struct slot *slot = await_return(p, sp);

	if (!slot)
		return false;
	slot->saved[0] = address;
	slot->saved[1] = size;
	barrier();
	*(volatile u64 *)sp = slot->stub;
	return true;
}

/* A free of what an earlier session has allocated, or clear() has forgotten. */
static __slow bool freed_late(const struct probe *p, const u64 *sp, u64 bp, u64 address, u64 stack,
			      u64 session)
{
	u64 frames[UNWOUND];

	return CALLED(say(p, LATE, stack, address, session, frames, unwind(p, sp, bp, frames)));
}

/* At the entry of what frees an address; *stack is that of the call once it was looked at. */
static __always_inline void freeing(struct probe *p, const u64 *sp, u64 bp, u64 address, bool quiet,
				    u64 *stack)
{
	struct control *control = CONTROL_BLOCK;
	u64 allocated, session;

	if (strike_out(address, &allocated, &session)) {
		count_hit(p);
		note_recent(p, sp);
		if (likely(session == control->session))
			atomic_add(&control->frees[allocated >> MODULE_SHIFT & (NAMES - 1)], 1);
		else
			CALLED(freed_late(p, sp, bp, address, allocated, session));
		return;
	}
	if (*stack == NOT_LOOKED_AT)
		*stack = likely(control->span) ? look_at_stack(p, sp, bp) : 0;
	if (unlikely(*stack)) {
		count_hit(p);
		note_recent(p, sp);
		if (!quiet)
			CALLED(say(p, UNALLOCATED, *stack, address, control->session, 0, 0));
	}
}

/* Behind the frame pointer: the return to the stub, pp, and then the function's own stack. */
#define ENTRY_SP ((const u64 *)__builtin_frame_address(0) + 3)
#define ENTRY_BP (*(const u64 *)__builtin_frame_address(0))

#define ALLOCATOR(number, each, address_of, size_of, count_of)                                     \
	__handler void handler_##number(u64 a1, u64 a2, u64 a3, u64 a4, u64 a5, u64 a6, u64 pp)    \
	{                                                                                          \
		if (likely(CONTROL_BLOCK->span))                                                   \
			allocating((struct probe *)pp, ENTRY_SP, ENTRY_BP, a1, a2, a3, a4);        \
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
				enter_block(address, (size_of), slot->saved[0]);                   \
		}                                                                                  \
		release_slot(slot);                                                                \
	}

#define RELEASER(number, each, address_of, quiet, count_of)                                        \
	__handler void handler_##number(u64 a1, u64 a2, u64 a3, u64 a4, u64 a5, u64 a6, u64 pp)    \
	{                                                                                          \
		u64 n, address, stack = NOT_LOOKED_AT;                                             \
                                                                                                   \
		for (n = 0; n < (u64)(count_of); n++) {                                            \
			address = each ? ((const u64 *)(address_of))[n] : (u64)(address_of);       \
			if (is_memory(address))                                                    \
				freeing((struct probe *)pp, ENTRY_SP, ENTRY_BP, address, quiet,    \
					&stack);                                                   \
		}                                                                                  \
	}

/* A block that has moved was allocated and freed as any other. */
#define RESIZER(number, address_of, size_of)                                                       \
	__handler void handler_##number(u64 a1, u64 a2, u64 a3, u64 a4, u64 a5, u64 a6, u64 pp)    \
	{                                                                                          \
		u64 address = (u64)(address_of), bucket;                                           \
		u32 key;                                                                           \
                                                                                                   \
		if (is_memory(address) && unlikely(find_address(address, &bucket, &key)))          \
			CALLED(resizing((struct probe *)pp, ENTRY_SP, address, (u64)(size_of)));   \
	}                                                                                          \
	__handler void return_##number(struct slot *slot, u64 ret, u64 rdx, u64 *place)            \
	{                                                                                          \
		u64 bucket;                                                                        \
		u32 key;                                                                           \
                                                                                                   \
		*place = slot->ret_addr;                                                           \
		if (ret == slot->saved[0] && find_address(ret, &bucket, &key))                     \
			block_at(bucket, key)->size = slot->saved[1];                              \
		release_slot(slot);                                                                \
	}
