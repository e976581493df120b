/*
 * nester DEPTH TIMES: put an epoll descriptor into another one, that into a third, and so on.
 *
 * For each of them the kernel looks for loops with ep_loop_check_proc(), which calls itself once
 * for each level below: DEPTH descriptors (at most 4 below one another) make it run
 * DEPTH * (DEPTH + 1) / 2 times. All of it is done TIMES times. Prints how many were put in.
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	long depth = argc > 2 ? atol(argv[1]) : 0;
	long times = argc > 2 ? atol(argv[2]) : 0;
	long succeeded = 0;

	if (depth < 1 || depth > 4 || times < 1) {
		fprintf(stderr, "usage: nester DEPTH TIMES\n");
		return 2;
	}
	for (long n = 0; n < times; n++) {
		int fds[5];

		fds[0] = epoll_create1(0);
		for (long i = 0; i < depth; i++) {
			struct epoll_event event = { .events = EPOLLIN };

			fds[i + 1] = epoll_create1(0);
			succeeded += !epoll_ctl(fds[i + 1], EPOLL_CTL_ADD, fds[i], &event);
		}
		for (long i = 0; i <= depth; i++)
			close(fds[i]);
	}
	printf("%ld\n", succeeded);
	return 0;
}
