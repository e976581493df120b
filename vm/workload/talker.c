/*
 * talker ROUNDS: processes that talk to each other over all that the kernel has for it: TCP, UDP and
 * UNIX sockets, descriptors passed along, some never taken out, pipes, and what is waited for with
 * epoll. Prints how many rounds were done.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <unistd.h>

static char data[65536];

static int check(long result, const char *what)
{
	if (result < 0) {
		perror(what);
		exit(1);
	}
	return (int)result;
}

static void send_all(int fd, size_t size)
{
	for (size_t done = 0; done < size; )
		done += check(write(fd, data, size - done), "write");
}

static void receive_all(int fd, size_t size)
{
	for (size_t done = 0; done < size; ) {
		int got = check(read(fd, data, sizeof(data)), "read");

		if (!got) {
			fprintf(stderr, "the other end is gone\n");
			exit(1);
		}
		done += got;
	}
}

static void reap(pid_t child)
{
	int status;

	check(waitpid(child, &status, 0), "waitpid");
	if (status) {
		fprintf(stderr, "a child ended with %#x\n", status);
		exit(1);
	}
}

static void talk_tcp(void)
{
	struct sockaddr_in address = { .sin_family = AF_INET };
	socklen_t length = sizeof(address);
	int listener = check(socket(AF_INET, SOCK_STREAM, 0), "socket");
	pid_t child;
	int fd;

	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	check(bind(listener, (void *)&address, length), "bind");
	check(listen(listener, 4), "listen");
	check(getsockname(listener, (void *)&address, &length), "getsockname");
	child = check(fork(), "fork");
	if (!child) {
		fd = check(socket(AF_INET, SOCK_STREAM, 0), "socket");
		check(connect(fd, (void *)&address, length), "connect");
		send_all(fd, 4 * sizeof(data));
		receive_all(fd, 1000);
		_exit(0);
	}
	fd = check(accept(listener, NULL, NULL), "accept");
	receive_all(fd, 4 * sizeof(data));
	send_all(fd, 1000);
	reap(child);
	close(fd);
	close(listener);
}

static void talk_udp(void)
{
	struct sockaddr_in address = { .sin_family = AF_INET };
	socklen_t length = sizeof(address);
	int fds[2];

	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	for (int i = 0; i < 2; i++)
		fds[i] = check(socket(AF_INET, SOCK_DGRAM, 0), "socket");
	check(bind(fds[0], (void *)&address, length), "bind");
	check(getsockname(fds[0], (void *)&address, &length), "getsockname");
	/* More than one page of fragments, and some that nobody reads. */
	for (size_t size = 1; size <= 16000; size = size * 5 + 3) {
		check(sendto(fds[1], data, size, 0, (void *)&address, length), "sendto");
		if (size < 4000)
			check(recv(fds[0], data, sizeof(data), 0), "recv");
	}
	close(fds[0]);
	close(fds[1]);
}

static void pass(int through, int fd)
{
	union {
		char room[CMSG_SPACE(sizeof(int))];
		struct cmsghdr header;
	} control = { .header = { .cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET,
				  .cmsg_type = SCM_RIGHTS } };
	struct iovec vector = { data, 1 };
	struct msghdr message = { .msg_iov = &vector, .msg_iovlen = 1, .msg_control = &control,
				  .msg_controllen = sizeof(control) };

	memcpy(CMSG_DATA(&control.header), &fd, sizeof(fd));
	check(sendmsg(through, &message, 0), "sendmsg");
}

static void talk_unix(void)
{
	int pair[2], pipes[2];

	check(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), "socketpair");
	check(pipe(pipes), "pipe");
	check(write(pair[0], data, 5000), "write");
	receive_all(pair[1], 5000);
	pass(pair[0], pipes[0]);
	/* Each is in flight in the other: only the garbage collector gets them out. */
	pass(pair[0], pair[1]);
	pass(pair[1], pair[0]);
	for (int i = 0; i < 2; i++) {
		close(pair[i]);
		close(pipes[i]);
	}
}

static void use_pipes(void)
{
	int from[2], to[2];

	check(pipe(from), "pipe");
	check(pipe(to), "pipe");
	for (int i = 0; i < 8; i++) {
		check(write(from[1], data, 8192), "write");
		check(tee(from[0], to[1], 8192, 0), "tee");
		check(splice(from[0], NULL, to[1], NULL, 8192, 0), "splice");
		receive_all(to[0], 16384);
	}
	for (int i = 0; i < 2; i++) {
		close(from[i]);
		close(to[i]);
	}
}

static void wait_for_things(void)
{
	struct itimerspec soon = { .it_value = { 0, 1000000 } };
	struct epoll_event event = { .events = EPOLLIN }, ready;
	int epoll = check(epoll_create1(0), "epoll_create1");
	int counter = check(eventfd(1, 0), "eventfd");
	int timer = check(timerfd_create(CLOCK_MONOTONIC, 0), "timerfd_create");
	int watch = check(inotify_init(), "inotify_init");
	int memory = check(memfd_create("talker", 0), "memfd_create");
	uint64_t value;
	char *mapped;

	check(timerfd_settime(timer, 0, &soon, NULL), "timerfd_settime");
	check(inotify_add_watch(watch, "/tmp", IN_ALL_EVENTS), "inotify_add_watch");
	check(epoll_ctl(epoll, EPOLL_CTL_ADD, counter, &event), "epoll_ctl");
	check(epoll_ctl(epoll, EPOLL_CTL_ADD, timer, &event), "epoll_ctl");
	check(epoll_wait(epoll, &ready, 1, -1), "epoll_wait");
	check(read(timer, &value, sizeof(value)), "read");
	check(ftruncate(memory, sizeof(data)), "ftruncate");
	mapped = mmap(NULL, sizeof(data), PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
	if (mapped == MAP_FAILED)
		check(-1, "mmap");
	memset(mapped, 1, sizeof(data));
	munmap(mapped, sizeof(data));
	close(memory);
	close(watch);
	close(timer);
	close(counter);
	close(epoll);
}

int main(int argc, char **argv)
{
	int rounds = argc == 2 ? atoi(argv[1]) : 0, done;

	if (rounds < 1) {
		fprintf(stderr, "usage: talker ROUNDS\n");
		return 2;
	}
	for (done = 0; done < rounds; done++) {
		talk_tcp();
		talk_udp();
		talk_unix();
		use_pipes();
		wait_for_things();
	}
	printf("%d\n", done);
	return 0;
}
