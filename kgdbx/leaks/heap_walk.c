/*
 * The loops of the leak scan that look at every word: freelists, pointers between blocks, and
 * what can be reached. Memory comes as copies of page frames; nothing of it is trusted.
 *
 * A node is a block of memory: a slot of a slab, pages, a vmalloc area, a per-CPU allocation.
 * A group is a row of nodes of one size in adjacent memory: a slab, or one block of another kind.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define FRAME_WORDS 512
#define PAGE_SHIFT 12

enum { ALLOCATED = 1, NO_SCAN = 2, VM_STRUCT = 4 };	/* of a node */
enum { HOLDS_AREAS = 1, IS_SLAB = 2 };			/* of a group: struct vmap_area */
enum { SOURCE_ROOT = -1, SOURCE_NONE = -2 };
enum { LIST_GOOD, LIST_LOOPS, LIST_LEAVES };

struct tables {
	uint64_t direct_map, nframes;
	const int32_t *frame_group;		/* -1: none */
	const int64_t *group_base;		/* guest-physical */
	const uint32_t *group_size, *group_count, *group_first;
	const uint8_t *group_flags;
	const uint8_t *node_flags;
	uint64_t vmemmap, page_struct_bytes;
	uint64_t nareas;
	const uint64_t *area_start, *area_end;	/* sorted */
	const uint32_t *area_node;
	uint64_t npercpu, percpu_exact_below;
	const uint64_t *percpu_start, *percpu_end;	/* sorted */
	const uint32_t *percpu_node;
	uint64_t va_start, va_end, vm;		/* offsets in struct vmap_area */
};

/* The last of `n` sorted values that is no larger than `value`, or -1. */
static int64_t last_at_most(const uint64_t *sorted, uint64_t n, uint64_t value)
{
	uint64_t low = 0, high = n;

	while (low < high) {
		uint64_t middle = (low + high) / 2;

		if (sorted[middle] <= value)
			low = middle + 1;
		else
			high = middle;
	}
	return (int64_t)low - 1;
}

static int64_t node_at_physical(const struct tables *t, uint64_t physical)
{
	int32_t group = t->frame_group[physical >> PAGE_SHIFT];
	uint64_t index;

	if (group < 0)
		return -1;
	if (t->group_count[group] == 1)
		return t->group_first[group];
	index = (physical - (uint64_t)t->group_base[group]) / t->group_size[group];
	return index < t->group_count[group] ? (int64_t)t->group_first[group] + (int64_t)index : -1;
}

/* The node that a word points to or into, or -1. */
static int64_t node_at(const struct tables *t, uint64_t word)
{
	uint64_t offset = word - t->direct_map;
	int64_t at;

	if (!word)
		return -1;
	if (offset >> PAGE_SHIFT < t->nframes)
		return node_at_physical(t, offset);
	offset = word - t->vmemmap;
	if (offset < t->nframes * t->page_struct_bytes) {
		int32_t group = t->frame_group[offset / t->page_struct_bytes];

		/* Whoever points to a slab's struct page does not hold its objects. */
		return group >= 0 && t->group_count[group] == 1 && !(t->group_flags[group] & IS_SLAB)
			? (int64_t)t->group_first[group] : -1;
	}
	if (t->nareas && word >= t->area_start[0] && word < t->area_end[t->nareas - 1]) {
		at = last_at_most(t->area_start, t->nareas, word);
		return at >= 0 && word < t->area_end[at] ? (int64_t)t->area_node[at] : -1;
	}
	if (!t->npercpu || word < t->percpu_start[0] || word >= t->percpu_end[t->npercpu - 1])
		return -1;
	at = last_at_most(t->percpu_start, t->npercpu, word);
	if (at < 0 || word >= t->percpu_end[at])
		return -1;
	/* Small numbers are common: only what could be the pointer itself counts, two flags aside. */
	if (word < t->percpu_exact_below && (word & ~UINT64_C(3)) != t->percpu_start[at])
		return -1;
	return t->percpu_node[at];
}

/*
 * Edges from records of `record_words` words. The source of a record is a node, or SOURCE_ROOT:
 * then what it points to is marked in `seeds`. Returns how many edges were written; `sources`
 * and `targets` have room for one a word.
 */
int64_t edges_of_records(const struct tables *t, const uint64_t *words, uint64_t record_words,
			 uint64_t nrecords, const int64_t *source_of, uint32_t *sources,
			 uint32_t *targets, uint8_t *seeds)
{
	int64_t n = 0;

	for (uint64_t record = 0; record < nrecords; record++, words += record_words) {
		int64_t source = source_of[record];

		if (source == SOURCE_NONE)
			continue;
		if (source >= 0 && t->node_flags[source] & NO_SCAN)
			continue;
		for (uint64_t i = 0; i < record_words; i++) {
			int64_t target = node_at(t, words[i]);

			if (target < 0 || target == source)
				continue;
			if (source == SOURCE_ROOT) {
				seeds[target] = 1;
			} else {
				sources[n] = (uint32_t)source;
				targets[n++] = (uint32_t)target;
			}
		}
	}
	return n;
}

/*
 * Whether a word of a struct vmap_area is what tells of its area. All areas are in a tree, so if
 * that counted no area would ever be lost. The cache may hold other things: be particular.
 */
static int tells_of_area(const struct tables *t, uint64_t word, int64_t target, uint64_t inside)
{
	if (inside == t->vm)
		return !!(t->node_flags[target] & VM_STRUCT);
	return (inside == t->va_start || inside == t->va_end) && !(word & 0xfff);
}

/* Edges from the allocated objects in frames of slabs. */
int64_t edges_of_slabs(const struct tables *t, const uint64_t *words, uint64_t nframes,
		       const int64_t *pfns, uint32_t *sources, uint32_t *targets)
{
	int64_t n = 0;

	for (uint64_t f = 0; f < nframes; f++, words += FRAME_WORDS) {
		int32_t group = t->frame_group[pfns[f]];
		uint64_t size, offset, index, inside;

		if (group < 0)
			continue;
		size = t->group_size[group];
		offset = ((uint64_t)pfns[f] << PAGE_SHIFT) - (uint64_t)t->group_base[group];
		index = offset / size;
		inside = offset % size;
		for (uint64_t i = 0; i < FRAME_WORDS && index < t->group_count[group]; ) {
			uint64_t left = (size - inside + 7) / 8;
			uint64_t end = i + left < FRAME_WORDS ? i + left : FRAME_WORDS;
			uint32_t node = t->group_first[group] + (uint32_t)index;
			int scanned = (t->node_flags[node] & (ALLOCATED | NO_SCAN)) == ALLOCATED;

			for (; scanned && i < end; i++, inside += 8) {
				int64_t target = node_at(t, words[i]);

				if (target < 0 || target == node)
					continue;
				if (t->group_flags[group] & HOLDS_AREAS &&
				    tells_of_area(t, words[i], target, inside))
					continue;
				sources[n] = node;
				targets[n++] = (uint32_t)target;
			}
			inside = i < end ? inside + 8 * (end - i) : inside;
			i = end;
			if (inside >= size) {
				inside -= size;
				index++;
			}
		}
	}
	return n;
}

/*
 * Follow freelists, and take ALLOCATED from what is on them. A list is of one slab; its words
 * start at word `slab_at` of `words`.
 */
void walk_freelists(const uint64_t *words, uint64_t nlists, const uint64_t *slab_at,
		    const uint64_t *slab_address, const uint64_t *head, const uint32_t *size,
		    const uint32_t *count, const uint32_t *offset, const uint64_t *random,
		    int encoded, const uint32_t *first, uint8_t *node_flags, uint8_t *verdict)
{
	for (uint64_t l = 0; l < nlists; l++) {
		uint64_t at = head[l];

		verdict[l] = LIST_GOOD;
		while (at) {
			uint64_t from = at - slab_address[l], index = from / size[l], place, next;

			if (index >= count[l] || from % size[l] || offset[l] + 8 > size[l]) {
				verdict[l] = LIST_LEAVES;
				break;
			}
			if (!(node_flags[first[l] + index] & ALLOCATED)) {
				verdict[l] = LIST_LOOPS;
				break;
			}
			node_flags[first[l] + index] &= (uint8_t)~ALLOCATED;
			place = at + offset[l];
			memcpy(&next, (const char *)(words + slab_at[l]) + (place - slab_address[l]), 8);
			/* freelist_ptr_decode(), mm/slub.c */
			at = encoded ? next ^ random[l] ^ __builtin_bswap64(place) : next;
		}
	}
}

/*
 * What can be reached from the nodes in `reached`, which are marked there. Returns 0, or -1 if
 * there is no memory for it.
 */
int reach(uint64_t nnodes, uint64_t nedges, const uint32_t *sources, const uint32_t *targets,
	  uint8_t *reached)
{
	uint64_t *start = calloc(nnodes + 2, sizeof(*start));
	uint32_t *sorted = malloc((nedges + 1) * sizeof(*sorted));
	uint32_t *stack = malloc((nnodes + 1) * sizeof(*stack));
	uint64_t depth = 0;
	int result = -1;

	if (!start || !sorted || !stack)
		goto out;
	for (uint64_t i = 0; i < nedges; i++)
		start[sources[i] + 2]++;
	for (uint64_t i = 1; i < nnodes + 2; i++)
		start[i] += start[i - 1];
	for (uint64_t i = 0; i < nedges; i++)
		sorted[start[sources[i] + 1]++] = targets[i];
	for (uint64_t i = 0; i < nnodes; i++)
		if (reached[i])
			stack[depth++] = (uint32_t)i;
	while (depth) {
		uint32_t node = stack[--depth];

		for (uint64_t i = start[node]; i < start[node + 1]; i++) {
			if (!reached[sorted[i]]) {
				reached[sorted[i]] = 1;
				stack[depth++] = sorted[i];
			}
		}
	}
	result = 0;
out:
	free(start);
	free(sorted);
	free(stack);
	return result;
}

/* Where words are that point into one of `nranges` sorted ranges; at most `room` of them. */
uint64_t find_words(const uint64_t *words, uint64_t nwords, uint64_t nranges,
		    const uint64_t *range_start, const uint64_t *range_end, uint64_t *found,
		    uint64_t room)
{
	uint64_t n = 0;

	for (uint64_t i = 0; i < nwords && n < room; i++) {
		if (words[i] < range_start[0] || words[i] >= range_end[nranges - 1])
			continue;
		int64_t at = last_at_most(range_start, nranges, words[i]);

		if (at >= 0 && words[i] < range_end[at])
			found[n++] = i;
	}
	return n;
}
