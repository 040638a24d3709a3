export function Job({ id }: { id: string }) {
  return <h1>{id}</h1>;
}
