/*
 * The exec agent: runs commands that come in over a serial port, several at once.
 *
 * In, one line each; anything else is ignored, so that noise on the line does no harm:
 *   run ID HEX   run the command that HEX encodes with /bin/sh
 *   kill ID      send SIGKILL to it and its children
 * Out, frames: \x01 "kx ID KIND LENGTH\n", then LENGTH bytes:
 *   'o' output (standard output and error together), 'x' the exit status in decimal, the last one.
 * ID is 16 characters that the host chooses. A repeated ID is run once.
 *
 * It is process 1, so it also reaps orphans.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#define MAX_JOBS 64
#define ID_SIZE 16

struct job {
	char id[ID_SIZE + 1];
	pid_t pid; /* 0: free */
	int fd;
};

static struct job jobs[MAX_JOBS];
static char last_id[ID_SIZE + 1];
static char line[1 << 18];
static size_t line_size;
static int port;
static int wakeup[2];

static void write_all(const char *data, size_t size)
{
	while (size) {
		ssize_t n = write(port, data, size);

		if (n < 0 && errno != EINTR)
			_exit(1);
		if (n > 0) {
			data += n;
			size -= n;
		}
	}
}

static void send_frame(const char *id, char kind, const char *data, size_t size)
{
	char head[64];
	int n = snprintf(head, sizeof(head), "\001kx %s %c %zu\n", id, kind, size);

	write_all(head, n);
	write_all(data, size);
}

static void send_status(const char *id, int status)
{
	char text[16];
	int n = snprintf(text, sizeof(text), "%d", status);

	send_frame(id, 'x', text, n);
}

/* Pass on what a job wrote; false when there is no more now. */
static int pass_output(struct job *job)
{
	char data[4096];
	ssize_t n;

	if (job->fd < 0)
		return 0;
	n = read(job->fd, data, sizeof(data));
	if (n > 0) {
		send_frame(job->id, 'o', data, n);
		return 1;
	}
	if (n == 0) {
		close(job->fd);
		job->fd = -1;
	}
	return 0;
}

static void start_job(const char *id, char *command)
{
	struct job *job = jobs;
	int out[2], null;

	while (job < jobs + MAX_JOBS && job->pid)
		job++;
	if (job == jobs + MAX_JOBS || pipe2(out, O_CLOEXEC)) {
		send_status(id, 126);
		return;
	}
	strcpy(job->id, id);
	job->pid = vfork();
	if (job->pid == 0) {
		setsid();
		null = open("/dev/null", O_RDONLY);
		dup2(null, 0);
		dup2(out[1], 1);
		dup2(out[1], 2);
		execl("/bin/sh", "sh", "-c", command, NULL);
		_exit(127);
	}
	close(out[1]);
	job->fd = out[0];
	fcntl(job->fd, F_SETFL, O_NONBLOCK);
	if (job->pid < 0) {
		close(job->fd);
		job->pid = 0;
		send_status(id, 126);
	}
}

static void reap_jobs(void)
{
	int status;
	pid_t pid;

	while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
		for (struct job *job = jobs; job < jobs + MAX_JOBS; job++) {
			if (job->pid != pid)
				continue;
			while (pass_output(job))
				;
			if (job->fd >= 0)
				close(job->fd);
			job->pid = 0;
			send_status(job->id, WIFSIGNALED(status) ? 128 + WTERMSIG(status)
								 : WEXITSTATUS(status));
		}
	}
}

static int decode_hex(char *text)
{
	char *out = text;
	unsigned int byte;

	for (; text[0] && text[1]; text += 2) {
		if (sscanf(text, "%2x", &byte) != 1)
			return -1;
		*out++ = byte;
	}
	*out = 0;
	return text[0] ? -1 : 0;
}

static void obey_line(void)
{
	char id[ID_SIZE + 1], *rest;
	int used = 0;

	if (sscanf(line, "run %16s %n", id, &used) == 1 && used) {
		if (strlen(id) != ID_SIZE || !strcmp(id, last_id))
			return;
		rest = line + used;
		if (decode_hex(rest))
			return;
		strcpy(last_id, id);
		if (*rest)
			start_job(id, rest);
		else
			send_status(id, 0);
	} else if (sscanf(line, "kill %16s", id) == 1) {
		for (struct job *job = jobs; job < jobs + MAX_JOBS; job++)
			if (job->pid && !strcmp(job->id, id))
				kill(-job->pid, SIGKILL);
	}
}

static void read_port(void)
{
	char data[4096];
	ssize_t n = read(port, data, sizeof(data));

	for (ssize_t i = 0; i < n; i++) {
		if (data[i] == '\n') {
			line[line_size] = 0;
			obey_line();
			line_size = 0;
		} else if (line_size < sizeof(line) - 1) {
			line[line_size++] = data[i];
		}
	}
}

static void on_child(int signal)
{
	int saved = errno;

	(void)signal;
	if (write(wakeup[1], "", 1) < 0) {
		/* full: poll() wakes up anyway */
	}
	errno = saved;
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_handler = on_child, .sa_flags = SA_NOCLDSTOP };
	struct pollfd fds[MAX_JOBS + 2];
	struct termios mode;
	char drain[64];

	if (argc < 2 || (port = open(argv[1], O_RDWR | O_NOCTTY | O_CLOEXEC)) < 0)
		return 1;
	tcgetattr(port, &mode);
	cfmakeraw(&mode);
	cfsetspeed(&mode, B115200); /* QEMU delays a short input by four bytes' time */
	tcsetattr(port, TCSANOW, &mode);
	if (pipe2(wakeup, O_CLOEXEC | O_NONBLOCK))
		return 1;
	sigaction(SIGCHLD, &action, NULL);
	for (;;) {
		fds[0] = (struct pollfd){ .fd = port, .events = POLLIN };
		fds[1] = (struct pollfd){ .fd = wakeup[0], .events = POLLIN };
		for (int i = 0; i < MAX_JOBS; i++)
			fds[2 + i] = (struct pollfd){ .fd = jobs[i].pid ? jobs[i].fd : -1,
						      .events = POLLIN };
		if (poll(fds, MAX_JOBS + 2, -1) < 0)
			continue;
		while (read(wakeup[0], drain, sizeof(drain)) > 0)
			;
		for (int i = 0; i < MAX_JOBS; i++)
			if (fds[2 + i].fd >= 0 && fds[2 + i].revents)
				pass_output(&jobs[i]);
		reap_jobs();
		if (fds[0].revents & POLLIN)
			read_port();
		else if (fds[0].revents)
			return 1;
	}
}
