// A small program of a user of dockerode: the whole life of a container, its streams, events, a network and a volume.
// Arguments: the engine's socket, the directory of node's packages.
'use strict';
const [, , socketPath, modules] = process.argv;
const Docker = require(`${modules}/dockerode`);
const { PassThrough } = require('stream');

const check = (ok, what) => {
  if (!ok) throw new Error(what);
};
const collect = (stream) => {
  let text = '';
  stream.on('data', (chunk) => (text += chunk));
  return () => text;
};
const until = async (ready, what) => {
  for (let tries = 0; !ready(); tries++) {
    check(tries < 600, what);
    await new Promise((done) => setTimeout(done, 50));
  }
};
const ended = (stream) => new Promise((done, failed) => stream.on('end', done).on('close', done).on('error', failed));

(async () => {
  const docker = new Docker({ socketPath });
  check((await docker.ping()).toString() === 'OK', 'ping');
  check((await docker.listImages()).some((image) => image.RepoTags.includes('busybox:latest')), 'images');

  const events = await docker.getEvents({ filters: { type: ['container'] } });
  const seen = collect(events);

  const output = new PassThrough();
  const printed = collect(output);
  const [result, ran] = await docker.run('busybox', ['sh', '-c', 'echo out; exit 3'], output, { HostConfig: {} });
  check(result.StatusCode === 3, `run: ${JSON.stringify(result)}`);
  // Its streams and its status come on connections of their own.
  await until(() => printed().includes('out'), 'the output of run');
  await ran.remove();

  const volume = await docker.createVolume({ Name: 'node' });
  const network = await docker.createNetwork({ Name: 'node' });
  const container = await docker.createContainer({
    Image: 'busybox', name: 'node', Cmd: ['cat'], OpenStdin: true, StdinOnce: true, AttachStdin: true, AttachStdout: true,
    HostConfig: { Binds: ['node:/data'], NetworkMode: 'node' },
  });
  const stream = await container.attach({ stream: true, stdin: true, stdout: true, stderr: true, hijack: true });
  const [out, err] = [new PassThrough(), new PassThrough()];
  container.modem.demuxStream(stream, out, err);
  const echoed = collect(out);
  await container.start();

  const exec = await container.exec({ Cmd: ['sh', '-c', 'echo inside; exit 5'], AttachStdout: true });
  const running = await exec.start({ hijack: true });
  const said = new PassThrough();
  exec.modem.demuxStream(running, said, said);
  const inside = collect(said);
  await ended(running);
  check((await exec.inspect()).ExitCode === 5, 'exec status');
  check(inside().trim() === 'inside', `exec said ${inside()}`);

  check((await container.stats({ stream: false })).memory_stats !== undefined, 'stats');
  check((await container.top()).Processes.length === 1, 'top');
  const closed = ended(stream);
  stream.end('to and fro\n');
  check((await container.wait()).StatusCode === 0, 'wait');
  await closed;
  check(echoed() === 'to and fro\n', `attach gave ${echoed()}`);
  check((await container.logs({ stdout: true })).toString().includes('to and fro'), 'logs');
  await container.remove({ v: true });
  await network.remove();
  await volume.remove();

  let refused;
  await docker.getContainer('nobody').inspect().catch((error) => (refused = error));
  check(refused && refused.statusCode === 404, 'a missing container');
  for (const action of ['create', 'start', 'die', 'exec_die', 'destroy']) {
    await until(() => seen().includes(`"Action":"${action}"`), `the event ${action}`);
  }
  events.destroy();
  console.log('all of it');
})().catch((error) => {
  console.error(error);
  process.exit(1);
});
